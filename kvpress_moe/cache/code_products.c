/* Products of queries with codes, and sums of coded values, without decoding a whole block to memory.
   Built and called by compiled_products.py. Codes lie channel by channel: see codes/bit_packing.py. */
#include <stdint.h>
#include <stdlib.h>

#define BLOCK 256 /* pairs whose numbers are in the processor's first cache */
#define ROWS 8    /* queries whose sums are there at the same time */

/* A plane: width in bits, its first byte, its bytes, and where its channels are in the table. */
typedef struct { int32_t width, first, size, channels; } Plane;

/* The keys or the values of a tier. A pair's number stands for (number - middle) * scale, and its scale is what its
   byte stands for in a table. `zeros` has the middle of each channel; both it and the weights of the planes are
   multiplied by the channel's step. `starts` (heads + 1) says where the pairs of a head are, `offsets` (heads) where
   they stand among all pairs of the head. `positions` are those of transform codes, of 2 or 4 bytes, else NULL.
   Vectors that are not coded are in `whole` (pairs, channels), which else is NULL; of the rest they have only `starts`
   and `offsets`. A tier without pairs has no task, so nothing of it is read. */
typedef struct {
    const float *whole;
    const uint8_t *packed;
    int64_t n_pairs;
    const Plane *planes;
    const int32_t *channels;
    const float *weights;
    const float *zeros;
    const int64_t *starts, *offsets;
    const uint8_t *scales;
    const float *table;
    const void *positions;
    int32_t n_planes, n_channels, position_bytes;
} Tier;

/* Heads `from` to `to` of a layer. Their rows in all other tensors begin with `row`. */
typedef struct { const Tier *tiers; int64_t n_tiers, from, to, row; } Segment;

/* Pairs `first` to `end` of one head. */
typedef struct { const Tier *tier; int64_t head, row, first, end; } Task;

/* Numbers of four channels of a plane, and where these stand in the table of channels: four at a time, so that sums are
   loaded and stored less often. The channels of a plane are a multiple of four in every code. */
static void four_channels(const Tier *tier, Plane plane, int step, int64_t first, int n, float found[4][BLOCK],
                          int at[4]) {
    int parts = 8 / plane.width, mask = (1 << plane.width) - 1;
    for (int k = 0; k < 4; k++) {
        int number = 4 * step + k, part = number % parts, byte = number / parts;
        const uint8_t *bytes = tier->packed + (plane.first + byte) * tier->n_pairs + first;
        int shift = part * plane.width;
        at[k] = plane.channels + part * plane.size + byte;
        for (int j = 0; j < n; j++) found[k][j] = (float)((bytes[j] >> shift) & mask);
    }
}

/* Cuts all pairs into tasks of at most `most` pairs of one head. Returns their number. Fills `tasks`, unless it is NULL:
   then they are only counted. */
static int64_t cut(const Segment *segments, int64_t n_segments, int64_t most, Task *tasks) {
    int64_t count = 0;
    for (const Segment *segment = segments; segment < segments + n_segments; segment++)
        for (const Tier *tier = segment->tiers; tier < segment->tiers + segment->n_tiers; tier++)
            for (int64_t head = segment->from; head < segment->to; head++)
                for (int64_t first = tier->starts[head], stop = tier->starts[head + 1]; first < stop; first += most) {
                    if (tasks) {
                        int64_t end = first + most < stop ? first + most : stop;
                        tasks[count] = (Task){tier, head, segment->row + head - segment->from, first, end};
                    }
                    count++;
                }
    return count;
}

/* Place of a task's first pair among the logits of its head. */
static int64_t place_of(const Task *task) {
    return task->tier->offsets[task->head] + task->first - task->tier->starts[task->head];
}

/* Logits of keys that are not coded. */
static void whole_logits(const Task *task, const float *queries, int n_queries, int width, float *logits,
                         int64_t longest) {
    for (int q = 0; q < n_queries; q++) {
        const float *query = queries + (task->row * n_queries + q) * width;
        float *out = logits + (task->row * n_queries + q) * longest + place_of(task);
        for (int64_t pair = task->first; pair < task->end; pair++) {
            const float *key = task->tier->whole + pair * width;
            float sum = 0;
            for (int c = 0; c < width; c++) sum += query[c] * key[c];
            *out++ = sum;
        }
    }
}

/* logits (all rows, queries, longest). Queries (all rows, queries, width) are given as they are, in the basis of vector
   codes, `turned`, and of transform codes, `coefficients`; to the logits of these come `means` (all rows, queries,
   n_positions), at the position of each pair. */
int key_logits(const Segment *segments, int64_t n_segments, const float *queries, const float *turned,
               const float *coefficients, const float *means, int64_t n_positions, int n_queries, int width,
               float *logits, int64_t longest) {
    int64_t n_tasks = cut(segments, n_segments, BLOCK, NULL);
    Task *tasks = malloc(sizeof(Task) * (n_tasks ? n_tasks : 1));
    if (!tasks) return 1;
    cut(segments, n_segments, BLOCK, tasks);
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < n_tasks; t++) {
        const Task *task = tasks + t;
        const Tier *tier = task->tier;
        if (tier->whole) {
            whole_logits(task, queries, n_queries, width, logits, longest);
            continue;
        }
        int n = (int)(task->end - task->first);
        float sums[ROWS][BLOCK], found[4][BLOCK], scale[BLOCK];
        int32_t position[BLOCK];
        int at[4];
        for (int j = 0; j < n; j++) scale[j] = tier->table[tier->scales[task->first + j]];
        if (tier->positions) {
            if (tier->position_bytes == 2)
                for (int j = 0; j < n; j++) position[j] = ((const uint16_t *)tier->positions)[task->first + j];
            else
                for (int j = 0; j < n; j++) position[j] = ((const int32_t *)tier->positions)[task->first + j];
        }
        for (int start = 0; start < n_queries; start += ROWS) {
            int some = n_queries - start < ROWS ? n_queries - start : ROWS;
            int64_t row = task->row * n_queries + start;
            const float *query = (tier->positions ? coefficients : turned) + row * width;
            for (int q = 0; q < some; q++)
                for (int j = 0; j < n; j++) sums[q][j] = 0;
            for (int p = 0; p < tier->n_planes; p++) {
                Plane plane = tier->planes[p];
                for (int step = 0; step < 2 * plane.size / plane.width; step++) {
                    four_channels(tier, plane, step, task->first, n, found, at);
                    for (int q = 0; q < some; q++) {
                        float *sum = sums[q], factors[4];
                        for (int k = 0; k < 4; k++)
                            factors[k] = query[q * width + tier->channels[at[k]]] * tier->weights[at[k]];
                        for (int j = 0; j < n; j++)
                            sum[j] += factors[0] * found[0][j] + factors[1] * found[1][j] + factors[2] * found[2][j]
                                      + factors[3] * found[3][j];
                    }
                }
            }
            for (int q = 0; q < some; q++) {
                float constant = 0;
                for (int c = 0; c < tier->n_channels; c++) constant -= query[q * width + c] * tier->zeros[c];
                float *out = logits + (row + q) * longest + place_of(task);
                if (tier->positions) {
                    const float *mean = means + (row + q) * n_positions;
                    for (int j = 0; j < n; j++) out[j] = (sums[q][j] + constant) * scale[j] + mean[position[j]];
                } else {
                    for (int j = 0; j < n; j++) out[j] = (sums[q][j] + constant) * scale[j];
                }
            }
        }
    }
    free(tasks);
    return 0;
}

/* Sums of values that are not coded: into (queries, width). */
static void whole_sums(const Task *task, const float *shares, int64_t stride, int n_queries, int width, float *sums) {
    for (int q = 0; q < n_queries; q++) {
        const float *share = shares + (task->row * n_queries + q) * stride + place_of(task);
        for (int64_t pair = task->first; pair < task->end; pair++, share++) {
            const float *value = task->tier->whole + pair * width;
            for (int c = 0; c < width; c++) sums[q * width + c] += *share * value[c];
        }
    }
}

/* Adds the weighted values to sums (all rows, queries, width): those of vector codes to `rotated`, others to `whole`.
   shares (all rows, queries, stride) stand as the logits do. Parts are added in a fixed order. */
int value_sums(const Segment *segments, int64_t n_segments, const float *shares, int64_t stride, int n_queries,
               int width, float *whole, float *rotated) {
    int64_t most = 8 * BLOCK, n_tasks = cut(segments, n_segments, most, NULL), size = (int64_t)n_queries * width;
    Task *tasks = malloc(sizeof(Task) * (n_tasks ? n_tasks : 1));
    float *parts = calloc((n_tasks ? n_tasks : 1) * size, sizeof(float));
    if (!tasks || !parts) { free(tasks); free(parts); return 1; }
    cut(segments, n_segments, most, tasks);
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < n_tasks; t++) {
        Task task = tasks[t];
        const Tier *tier = task.tier;
        int64_t stop = task.end;
        if (tier->whole) {
            whole_sums(&task, shares, stride, n_queries, width, parts + t * size);
            continue;
        }
        float scaled[ROWS][BLOCK], found[4][BLOCK];
        int at[4];
        for (; task.first < stop; task.first += BLOCK) {
            int n = stop - task.first < BLOCK ? (int)(stop - task.first) : BLOCK;
            for (int start = 0; start < n_queries; start += ROWS) {
                int some = n_queries - start < ROWS ? n_queries - start : ROWS;
                float *part_of = parts + t * size + start * width;
                for (int q = 0; q < some; q++) {
                    const float *share = shares + (task.row * n_queries + start + q) * stride + place_of(&task);
                    float total = 0;
                    for (int j = 0; j < n; j++) {
                        scaled[q][j] = share[j] * tier->table[tier->scales[task.first + j]];
                        total += scaled[q][j];
                    }
                    for (int c = 0; c < tier->n_channels; c++) part_of[q * width + c] -= total * tier->zeros[c];
                }
                for (int p = 0; p < tier->n_planes; p++) {
                    Plane plane = tier->planes[p];
                    for (int step = 0; step < 2 * plane.size / plane.width; step++) {
                        four_channels(tier, plane, step, task.first, n, found, at);
                        for (int q = 0; q < some; q++) {
                            float totals[4] = {0, 0, 0, 0};
                            const float *share = scaled[q];
                            for (int j = 0; j < n; j++) {
                                totals[0] += share[j] * found[0][j];
                                totals[1] += share[j] * found[1][j];
                                totals[2] += share[j] * found[2][j];
                                totals[3] += share[j] * found[3][j];
                            }
                            for (int k = 0; k < 4; k++)
                                part_of[q * width + tier->channels[at[k]]] += tier->weights[at[k]] * totals[k];
                        }
                    }
                }
            }
        }
    }
    for (int64_t t = 0; t < n_tasks; t++) {
        float *sums = (tasks[t].tier->whole ? whole : rotated) + tasks[t].row * size;
        for (int64_t c = 0; c < size; c++) sums[c] += parts[t * size + c];
    }
    free(tasks);
    free(parts);
    return 0;
}
