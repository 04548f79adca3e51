// Numbers as people read them.

const plain = new Intl.NumberFormat("en");
const NARROW = "\u00a0";

export const count = (number) => plain.format(Math.round(number));

export function percent(share) {
  if (!Number.isFinite(share)) return "–";
  const digits = (share > 0.99 && share < 1) || (share > 0 && share < 0.1) ? 1 : 0;
  return `${(100 * share).toFixed(digits)}${NARROW}%`;
}

export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (number >= 1024 && unit < units.length - 1) {
    number /= 1024;
    unit += 1;
  }
  return `${number < 10 && unit ? number.toFixed(1) : Math.round(number)}${NARROW}${units[unit]}`;
}

export function rate(number) {
  return number >= 100 || Number.isInteger(number) ? count(number) : number.toFixed(1);
}

export function seconds(number) {
  if (number < 0.0995) return `${(1000 * number).toFixed(number < 0.00995 ? 1 : 0)}${NARROW}ms`;
  if (number < 120) return `${number.toFixed(number < 10 ? 1 : 0)}${NARROW}s`;
  if (number < 7200) return `${Math.round(number / 60)}${NARROW}min`;
  return `${(number / 3600).toFixed(1)}${NARROW}h`;
}

export const clock = (time) => new Date(1000 * time).toLocaleTimeString("en-GB");

// The number of a layer, as its name has it: 7 of "model.layers.7.mlp.experts".
export function layerNumber(name, index) {
  const found = /(?:^|\.)(\d+)(?:\.|$)/.exec(name);
  return found ? found[1] : String(index);
}

export const hitRate = (hits, misses) => (hits + misses ? hits / (hits + misses) : NaN);
