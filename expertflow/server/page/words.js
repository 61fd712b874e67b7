// Numbers in words, the same everywhere on the page.

const whole = new Intl.NumberFormat("en");

export const count = (n) => whole.format(n);
export const percent = (share) => `${(100 * share).toFixed(share > 0.995 || share === 0 ? 0 : 1)} %`;

export function bytes(n) {
  for (const [size, unit] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) {
    if (n >= 0.9995 * size) return `${digits(n / size)} ${unit}`;
  }
  return `${Math.round(n)} B`;
}

export function seconds(s) {
  if (s >= 100) return `${Math.round(s)} s`;
  return s >= 1 || s === 0 ? `${digits(s)} s` : `${digits(1000 * s)} ms`;
}

export const digits = (n) => (n >= 100 || n === 0 ? n.toFixed(0) : n >= 10 ? n.toFixed(1) : n.toFixed(2));

export const plural = (n, what) => `${count(n)} ${what}${n === 1 ? "" : "s"}`;
