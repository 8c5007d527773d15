// Numbers in words.

export const isKnown = (number) => typeof number === "number" && Number.isFinite(number);

export const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

export function size(bytes) {
  const power = bytes < 2 ** 20 ? 1 : bytes < 2 ** 30 ? 2 : 3, number = bytes / 2 ** (10 * power);
  return `${number.toLocaleString("en", { maximumFractionDigits: number < 100 ? 1 : 0 })} ${["", "KiB", "MiB", "GiB"][power]}`;
}

// "1.8 of 18.2 MiB", or the first size alone.
export function sizes(bytes, full) {
  if (!isKnown(full) || full <= 0) return size(bytes);
  const [part, whole] = [size(bytes), size(full)], unit = whole.slice(-3);
  return `${part.endsWith(unit) ? part.slice(0, -4) : part} of ${whole}`;
}

export function percent(share) {
  if (share > 0 && share < 0.001) return "< 0.1 %";
  return `${Number((100 * share).toFixed(share < 0.0995 ? 1 : 0))} %`;
}

export function seconds(time) {
  if (time < 0.01) return "0.01 s";
  if (time < 99.5) return `${time.toFixed(time < 1 ? 2 : time < 10 ? 1 : 0)} s`;
  const minutes = Math.floor(Math.round(time) / 60), rest = Math.round(time) % 60;
  return rest ? `${minutes} min ${rest} s` : `${minutes} min`;
}

export const rounded = (number) => Number(number.toPrecision(2)).toString();
