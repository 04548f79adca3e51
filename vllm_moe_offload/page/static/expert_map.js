// The map of experts: a row for each layer, a cell for each expert.

import { count, layerNumber, percent, seconds } from "./figures.js";

const ABSENT = 0;
const STATES = ["not in memory", "in memory", "in memory, in use"];
const LEVELS = 64;
const LABELS = 30;
const TOP = 16;
const TALLEST_ROW = 22;
const WIDEST_CELL = 34;
const MOST_HEIGHT = 430;
const LEAST_BARS = 40;

export const useOf = (map, cell) => map.most_uses * ((cell >> 2) / (LEVELS - 1)) ** 2;
export const stateOf = (cell) => cell & 3;

export function decode(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

export class ExpertMap {
  constructor(canvas, readout) {
    this.canvas = canvas;
    this.readout = readout;
    this.cursor = null;
    this.map = null;
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerdown", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => document.activeElement !== canvas && this.moveTo(null));
    canvas.addEventListener("keydown", (event) => this.press(event));
    canvas.addEventListener("focus", () => this.map && this.moveTo(this.cursor ?? [0, 0]));
    canvas.addEventListener("blur", () => this.moveTo(null));
  }

  show(map) {
    this.map = map;
    this.cells = decode(map.cells);
    this.draw();
  }

  press(event) {
    if (!this.map) return;
    const [layer, expert] = this.cursor ?? [0, 0];
    const last = [this.map.layers.length - 1, this.map.experts - 1];
    const to = {
      ArrowUp: [layer - 1, expert],
      ArrowDown: [layer + 1, expert],
      ArrowLeft: [layer, expert - 1],
      ArrowRight: [layer, expert + 1],
      Home: [layer, 0],
      End: [layer, last[1]],
      PageUp: [0, expert],
      PageDown: [last[0], expert],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    this.moveTo(to.map((number, axis) => Math.max(0, Math.min(number, last[axis]))));
  }

  point(event) {
    if (!this.layout) return;
    const { left, top } = this.canvas.getBoundingClientRect();
    const { cell, row, labels } = this.layout;
    const expert = Math.floor((event.clientX - left - labels) / cell);
    const layer = Math.floor((event.clientY - top - TOP) / row);
    const inside = expert >= 0 && expert < this.map.experts && layer >= 0 && layer < this.map.layers.length;
    this.moveTo(inside ? [layer, expert] : null);
  }

  moveTo(cursor) {
    this.cursor = cursor;
    this.say();
    this.draw();
  }

  say() {
    if (!this.map || !this.cursor) {
      this.readout.textContent = "Point at an expert, or move with the arrow keys.";
      return;
    }
    const [layer, expert] = this.cursor;
    const { hits, misses, stall_seconds: stalls, known, layers } = this.map;
    const cell = this.cells[layer * this.map.experts + expert];
    const uses = useOf(this.map, cell);
    const state = known ? `${STATES[stateOf(cell)]}, ` : "";
    const layerRate = hits[layer] + misses[layer] ? percent(hits[layer] / (hits[layer] + misses[layer])) : "–";
    this.readout.textContent =
      `Layer ${layerNumber(layers[layer], layer)}, expert ${expert}: ${state}` +
      `${uses < 0.5 ? "not used lately" : `used by about ${count(uses)} recent steps`}. ` +
      `The layer: hit rate ${layerRate}, waited ${seconds(stalls[layer])}.`;
  }

  measure() {
    const ratio = window.devicePixelRatio || 1;
    const width = this.canvas.clientWidth;
    const { experts, layers } = this.map;
    const room = width - LABELS - Math.max(LEAST_BARS, width * 0.06);
    const fit = Math.min(WIDEST_CELL, room / experts);
    // Whole device pixels, so that cells are equally wide; where there are fewer than that, fractions.
    const cell = fit * ratio >= 2 ? Math.floor(fit * ratio) / ratio : fit;
    const row = Math.max(5, Math.min(TALLEST_ROW, Math.floor(MOST_HEIGHT / layers.length)));
    return { ratio, width, cell, row, labels: LABELS, height: TOP + row * layers.length };
  }

  draw() {
    if (!this.map || !this.canvas.clientWidth) return;
    const layout = (this.layout = this.measure());
    const { ratio, width, height } = layout;
    this.canvas.style.height = `${height}px`;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    const style = getComputedStyle(this.canvas);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    this.drawCells(context, layout, shades(colour, this.map.known));
    this.drawAxes(context, layout, colour("muted"), style.fontFamily);
    this.drawBars(context, layout, colour("out"));
    if (this.cursor) this.drawCursor(context, layout, colour("ink"));
  }

  drawCells(context, { cell, row, labels, ratio }, palette) {
    const gap = cell * ratio >= 4 ? 1 / ratio : 0;
    const rowGap = row >= 5 ? 1 : 0;
    const { experts } = this.map;
    const device = (number) => Math.round(number * ratio) / ratio;
    this.cells.forEach((value, index) => {
      const x = labels + (index % experts) * cell;
      const y = TOP + Math.floor(index / experts) * row;
      context.fillStyle = palette[value];
      const left = gap ? device(x) : x;
      context.fillRect(left, y, cell - gap, row - rowGap);
    });
  }

  drawAxes(context, { cell, row, labels }, colour, family) {
    context.fillStyle = colour;
    context.font = `11px ${family}`;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const every = [1, 2, 4, 5, 10, 20, 50].find((step) => step * row >= 13) ?? 100;
    this.map.layers.forEach((name, layer) => {
      if (layer % every === 0) {
        context.fillText(layerNumber(name, layer), labels - 6, TOP + layer * row + Math.max(row / 2, 4));
      }
    });
    context.textAlign = "left";
    const step = [1, 2, 4, 8, 16, 32, 64, 128].find((size) => size * cell >= 44) ?? 256;
    for (let expert = 0; expert < this.map.experts; expert += step) {
      context.fillText(String(expert), labels + expert * cell, 6);
    }
  }

  drawBars(context, { cell, row, labels, width }, colour) {
    const left = labels + this.map.experts * cell + 10;
    const most = Math.max(...this.map.stall_seconds, 1e-9);
    const room = Math.min(width - left, 160);
    context.fillStyle = colour;
    context.globalAlpha = 0.6;
    this.map.stall_seconds.forEach((stall, layer) => {
      context.fillRect(left, TOP + layer * row + row * 0.15, (room * stall) / most, row * 0.6);
    });
    context.globalAlpha = 1;
  }

  drawCursor(context, { cell, row, labels }, colour) {
    const [layer, expert] = this.cursor;
    context.strokeStyle = colour;
    context.lineWidth = 2;
    context.strokeRect(labels + expert * cell - 1.5, TOP + layer * row - 1.5, Math.max(cell, 3) + 2, row + 2);
  }
}

// The colour of every value that a cell can have.
function shades(colour, known) {
  const [empty, low, high, out, plain] = ["cell", "in-low", "in", "out", "plain"].map((name) => channels(colour(name)));
  return Array.from({ length: 256 }, (_, value) => {
    const use = ((value >> 2) / (LEVELS - 1)) ** 1.3;
    if (!known) return mix(empty, plain, use);
    return stateOf(value) === ABSENT ? mix(empty, out, use) : mix(low, high, use);
  });
}

const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

const mix = (from, to, share) =>
  `rgb(${from.map((channel, index) => Math.round(channel + share * (to[index] - channel))).join(" ")})`;
