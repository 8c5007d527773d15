/* Products of queries with codes, and sums of coded values, without decoding a whole block to memory.
   Built and called by compiled_products.py. Codes lie channel by channel: see codes/bit_packing.py. */
#include <stdint.h>
#include <stdlib.h>

#define BLOCK 256 /* pairs whose numbers are in the processor's first cache */
#define ROWS 8    /* queries whose sums are there at the same time */

/* A plane: width in bits, its first byte, its bytes, and where its channels are in the table. */
typedef struct { int32_t width, first, size, channels; } Plane;

/* Numbers of four channels of a plane, and where these stand in the table of channels: four at a time, so that sums are
   loaded and stored less often. The channels of a plane are a multiple of four in every code. */
static void four_channels(const uint8_t *packed, int64_t n_pairs, Plane plane, int step, int64_t first, int n,
                          float found[4][BLOCK], int at[4]) {
    int parts = 8 / plane.width, mask = (1 << plane.width) - 1;
    for (int k = 0; k < 4; k++) {
        int number = 4 * step + k, part = number % parts, byte = number / parts;
        const uint8_t *bytes = packed + (plane.first + byte) * n_pairs + first;
        int shift = part * plane.width;
        at[k] = plane.channels + part * plane.size + byte;
        for (int j = 0; j < n; j++) found[k][j] = (float)((bytes[j] >> shift) & mask);
    }
}

/* Tasks are parts of heads, at most `most` pairs each. Returns their number; fills head, first and end of each. */
static int64_t tasks_of(int n_heads, const int64_t *starts, int64_t most, int64_t *tasks) {
    int64_t count = 0;
    for (int head = 0; head < n_heads; head++)
        for (int64_t first = starts[head]; first < starts[head + 1]; first += most, count++)
            if (tasks) {
                tasks[3 * count] = head;
                tasks[3 * count + 1] = first;
                tasks[3 * count + 2] = first + most < starts[head + 1] ? first + most : starts[head + 1];
            }
    return count;
}

/* logits (heads, rows, longest): those of pair i of a head stand at offsets[head] + i. The scale of a pair is what its
   byte stands for in a table. With means: (product + constant) * scale + mean at the pair's position, which takes 2
   or 4 bytes. Else: (product - constant * middle) * scale. */
int key_logits(const uint8_t *packed, int64_t n_pairs, int n_planes, const Plane *planes, const int32_t *channels,
               const float *weights, int n_heads, const int64_t *starts, const uint8_t *scales, const float *table,
               float middle, const void *positions, int position_bytes, const int64_t *offsets, const float *asked,
               int rows, int n_channels, const float *constants, const float *means, int64_t n_positions,
               float *logits, int64_t longest) {
    int64_t n_tasks = tasks_of(n_heads, starts, BLOCK, NULL);
    int64_t *tasks = malloc(sizeof(int64_t) * 3 * (n_tasks ? n_tasks : 1));
    if (!tasks) return 1;
    tasks_of(n_heads, starts, BLOCK, tasks);
#pragma omp parallel for schedule(static)
    for (int64_t task = 0; task < n_tasks; task++) {
        int64_t head = tasks[3 * task], first = tasks[3 * task + 1];
        int n = (int)(tasks[3 * task + 2] - first);
        float sums[ROWS][BLOCK], found[4][BLOCK], scale[BLOCK];
        int32_t position[BLOCK];
        int at[4];
        for (int j = 0; j < n; j++) scale[j] = table[scales[first + j]];
        if (means) {
            if (position_bytes == 2)
                for (int j = 0; j < n; j++) position[j] = ((const uint16_t *)positions)[first + j];
            else
                for (int j = 0; j < n; j++) position[j] = ((const int32_t *)positions)[first + j];
        }
        for (int row = 0; row < rows; row += ROWS) {
            int some = rows - row < ROWS ? rows - row : ROWS;
            const float *query = asked + (head * rows + row) * n_channels;
            for (int q = 0; q < some; q++)
                for (int j = 0; j < n; j++) sums[q][j] = 0;
            for (int p = 0; p < n_planes; p++)
                for (int step = 0; step < 2 * planes[p].size / planes[p].width; step++) {
                    four_channels(packed, n_pairs, planes[p], step, first, n, found, at);
                    for (int q = 0; q < some; q++) {
                        float *sum = sums[q], factors[4];
                        for (int k = 0; k < 4; k++)
                            factors[k] = query[q * n_channels + channels[at[k]]] * weights[at[k]];
                        for (int j = 0; j < n; j++)
                            sum[j] += factors[0] * found[0][j] + factors[1] * found[1][j] + factors[2] * found[2][j]
                                      + factors[3] * found[3][j];
                    }
                }
            for (int q = 0; q < some; q++) {
                float constant = constants[head * rows + row + q];
                float *out = logits + (head * rows + row + q) * longest + offsets[head] + first - starts[head];
                if (means) {
                    const float *mean = means + (head * rows + row + q) * n_positions;
                    for (int j = 0; j < n; j++)
                        out[j] = (sums[q][j] + constant) * scale[j] + mean[position[j]];
                } else {
                    for (int j = 0; j < n; j++) out[j] = (sums[q][j] - constant * middle) * scale[j];
                }
            }
        }
    }
    free(tasks);
    return 0;
}

/* Adds to sums (heads, rows, channels): share * scale * number, and to zeros (heads, rows): -share * scale * middle,
   over all pairs. shares (heads, rows, stride) stand as the logits do. Parts are added in a fixed order. */
int value_sums(const uint8_t *packed, int64_t n_pairs, int n_planes, const Plane *planes, const int32_t *channels,
               const float *weights, int n_heads, const int64_t *starts, const uint8_t *scales, const float *table,
               float middle, const void *positions, int position_bytes, const int64_t *offsets, const float *shares,
               int64_t stride, int rows, int n_channels, float *sums, float *zeros) {
    int64_t most = 8 * BLOCK, n_tasks = tasks_of(n_heads, starts, most, NULL), width = n_channels + 1;
    int64_t *tasks = malloc(sizeof(int64_t) * 3 * (n_tasks ? n_tasks : 1));
    float *parts = calloc((n_tasks ? n_tasks : 1) * rows * width, sizeof(float));
    if (!tasks || !parts) { free(tasks); free(parts); return 1; }
    tasks_of(n_heads, starts, most, tasks);
#pragma omp parallel for schedule(static)
    for (int64_t task = 0; task < n_tasks; task++) {
        int64_t head = tasks[3 * task];
        float scaled[ROWS][BLOCK], found[4][BLOCK];
        int at[4];
        for (int64_t first = tasks[3 * task + 1]; first < tasks[3 * task + 2]; first += BLOCK) {
            int n = tasks[3 * task + 2] - first < BLOCK ? (int)(tasks[3 * task + 2] - first) : BLOCK;
            for (int row = 0; row < rows; row += ROWS) {
                int some = rows - row < ROWS ? rows - row : ROWS;
                float *part_of = parts + (task * rows + row) * width;
                for (int q = 0; q < some; q++) {
                    const float *share = shares + (head * rows + row + q) * stride + offsets[head] + first - starts[head];
                    float total = 0;
                    for (int j = 0; j < n; j++) {
                        scaled[q][j] = share[j] * table[scales[first + j]];
                        total += scaled[q][j];
                    }
                    part_of[q * width + n_channels] -= total * middle;
                }
                for (int p = 0; p < n_planes; p++)
                    for (int step = 0; step < 2 * planes[p].size / planes[p].width; step++) {
                        four_channels(packed, n_pairs, planes[p], step, first, n, found, at);
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
                                part_of[q * width + channels[at[k]]] += weights[at[k]] * totals[k];
                        }
                    }
            }
        }
    }
    for (int64_t task = 0; task < n_tasks; task++)
        for (int row = 0; row < rows; row++) {
            const float *part_of = parts + (task * rows + row) * width;
            int64_t at = tasks[3 * task] * rows + row;
            for (int c = 0; c < n_channels; c++) sums[at * n_channels + c] += part_of[c];
            zeros[at] += part_of[n_channels];
        }
    free(tasks);
    free(parts);
    return 0;
}
