// Small charts of the last minutes.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 100;
const HEIGHT = 40;
const MOST_POINTS = 120;
const LEAST_SECONDS = 60;

// What grew between samples, in steps of equal length: [{time, seconds, ...difference of each column}].
export function differences(series) {
  const { time } = series;
  if (time.length < 2) return [];
  const last = time[time.length - 1];
  const span = Math.max(last - time[0], LEAST_SECONDS);
  const step = Math.max(2, span / MOST_POINTS);
  const result = [];
  let from = 0;
  for (let to = 1; to < time.length; to += 1) {
    const isEnd = to === time.length - 1;
    if (time[to] - time[from] < step * 0.99 && !isEnd) continue;
    const row = { time: time[to], seconds: time[to] - time[from] };
    for (const [name, values] of Object.entries(series)) {
      if (name !== "time") row[name] = values[to] - values[from];
    }
    if (row.seconds > 0 && (row.seconds >= step / 2 || !result.length)) result.push(row);
    from = to;
  }
  return result;
}

export class Card {
  constructor(parent, name, title, { top, base } = {}) {
    this.element = document.createElement("article");
    this.element.className = "card";
    this.element.dataset.name = name;
    this.element.innerHTML =
      `<h2></h2><p>–</p><svg viewBox="0 0 ${WIDTH} ${HEIGHT}" preserveAspectRatio="none" role="img">` +
      `<line class="base" x1="0" x2="${WIDTH}" y1="${HEIGHT}" y2="${HEIGHT}"/>` +
      `<path class="area"/><path class="curve"/></svg><footer><span></span><span></span></footer>`;
    this.element.querySelector("h2").textContent = title;
    this.title = title;
    this.top = top;
    this.base = base;
    this.svg = this.element.querySelector("svg");
    parent.append(this.element);
  }

  // rows: of differences(); value: of a row, NaN where there is none; text: of a value.
  show(now, rows, value, text) {
    const values = rows.map(value);
    const known = values.filter(Number.isFinite);
    const top = this.top ?? niceTop(Math.max(0, ...known), this.base);
    const begin = rows.length ? Math.min(rows[0].time - rows[0].seconds, rows.at(-1).time - LEAST_SECONDS) : 0;
    const end = rows.length ? rows.at(-1).time : 1;
    const x = (time) => (WIDTH * (time - begin)) / (end - begin);
    const y = (number) => HEIGHT * (1 - Math.min(number, top) / top);
    let curve = "";
    let area = "";
    let open = false;
    rows.forEach((row, index) => {
      if (!Number.isFinite(values[index])) {
        open = false;
        return;
      }
      const point = `${x(row.time).toFixed(2)} ${y(values[index]).toFixed(2)}`;
      curve += `${open ? "L" : "M"}${point}`;
      const next = index + 1 < rows.length && Number.isFinite(values[index + 1]);
      area += open ? `L${point}` : `M${x(row.time).toFixed(2)} ${HEIGHT}L${point}`;
      if (!next) area += `L${x(row.time).toFixed(2)} ${HEIGHT}Z`;
      open = true;
    });
    this.svg.querySelector(".curve").setAttribute("d", curve);
    this.svg.querySelector(".area").setAttribute("d", area);
    this.element.querySelector("p").textContent = now;
    const [left, right] = this.element.querySelectorAll("footer span");
    const minutes = Math.max(1, Math.round((end - begin) / 60));
    left.textContent = rows.length ? `${minutes} min` : "";
    right.textContent = rows.length ? `0 – ${text(top)}` : "";
    const range = known.length ? `between ${text(Math.min(...known))} and ${text(Math.max(...known))}` : "no values yet";
    this.svg.setAttribute("aria-label", `${this.title}, ${minutes} min: ${range}`);
  }
}

// The end of a scale, in units that grow by `base`.
function niceTop(number, base) {
  if (number <= 0) return 1;
  if (base && number >= base) return base * niceTop(number / base, base);
  const power = 10 ** Math.floor(Math.log10(number));
  const top = [1, 2, 5, 10].map((factor) => factor * power).find((end) => end >= number);
  return base && top >= 1000 ? base : top;
}

// A bar of parts: [{part, share}], of together at most 1.
export function stack(element, parts) {
  while (element.children.length < parts.length) element.append(document.createElement("i"));
  parts.forEach(({ part, share }, index) => {
    element.children[index].dataset.part = part;
    element.children[index].style.width = `${100 * share}%`;
  });
}
