// The last steps as bars: arithmetic below, what it waited for bytes above it.

import { colours, prepare } from "./canvas.js";
import { bytes, percent, plural, seconds } from "./words.js";

const MOST = 60;
const AXIS = 16; // pixels above the bars for the scale

export class Steps {
  constructor({ box, summary, spoken, tooltip }) {
    Object.assign(this, { box, summary, spoken, tooltip });
    this.canvas = box.querySelector("canvas");
    this.steps = [];
    this.chosen = null; // counted from the newest
    box.addEventListener("keydown", (event) => this.#key(event));
    box.addEventListener("focus", () => box.matches(":focus-visible") && this.#choose(0));
    box.addEventListener("blur", () => this.#leave());
    box.addEventListener("pointermove", (event) => this.#point(event));
    box.addEventListener("pointerleave", () => this.tooltip.hide());
    new ResizeObserver(() => this.draw()).observe(box);
    this.restyle();
  }

  restyle() {
    this.colours = colours();
    this.draw();
  }

  update(steps) {
    this.steps = steps.slice(-MOST);
    this.draw();
    if (!this.steps.length) {
      this.summary.textContent = "none yet";
      return;
    }
    const sum = (name) => this.steps.reduce((total, step) => total + step[name], 0);
    const sorted = this.steps.map((step) => step.seconds).sort((a, b) => a - b);
    this.summary.textContent = `${plural(sorted.length, "step")}, median ${seconds(sorted[Math.floor(sorted.length / 2)])}, `
      + `${percent(sum("stall_seconds") / Math.max(1e-9, sum("seconds")))} of it stalled`;
  }

  draw() {
    const width = this.box.clientWidth, height = this.canvas.clientHeight;
    if (!width) return;
    const context = prepare(this.canvas, width, height);
    const longest = Math.max(1e-4, ...this.steps.map((step) => step.seconds));
    const pitch = width / MOST, tall = height - AXIS;
    context.strokeStyle = context.fillStyle = this.colours.line;
    context.fillRect(0, height - 1, width, 1);
    context.setLineDash([2, 3]);
    context.beginPath();
    context.moveTo(0, AXIS + 0.5);
    context.lineTo(width, AXIS + 0.5);
    context.stroke();
    context.setLineDash([]);
    context.fillStyle = this.colours.muted;
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "top";
    if (this.steps.length) context.fillText(seconds(longest), 0, 1);
    this.steps.forEach((step, index) => {
      const age = this.steps.length - 1 - index, x = width - (age + 1) * pitch;
      this.#bar(context, step, x, Math.max(1, pitch - 2), height - 1, tall / longest, age === this.chosen);
    });
  }

  #bar(context, step, x, wide, floor, scale, chosen) {
    const stall = Math.min(step.stall_seconds, step.seconds) * scale, whole = step.seconds * scale;
    context.fillStyle = this.colours.resident;
    context.fillRect(x, floor - whole + stall, wide, whole - stall);
    if (stall >= 0.5) {
      context.save();
      context.beginPath();
      context.rect(x, floor - whole, wide, stall);
      context.clip();
      context.strokeStyle = this.colours.miss;
      context.lineWidth = 1.5;
      context.beginPath();
      for (let y = floor - whole - wide; y < floor; y += 4) {
        context.moveTo(x, y + wide);
        context.lineTo(x + wide, y);
      }
      context.stroke();
      context.strokeRect(x + 0.5, floor - whole + 0.5, wide - 1, Math.max(0, stall - 1));
      context.restore();
    }
    if (chosen) {
      context.strokeStyle = this.colours.accent;
      context.lineWidth = 2;
      context.strokeRect(x - 1, floor - whole - 1, wide + 2, whole + 1);
    }
  }

  #describe(step, age) {
    const when = age === 0 ? "Newest step" : `${plural(age, "step")} before`;
    return `${when}: ${seconds(step.seconds)}\n${seconds(step.seconds - step.stall_seconds)} arithmetic, `
      + `${seconds(step.stall_seconds)} stall\n${plural(step.rows, "sequence")}, ${bytes(step.load_bytes)} read`;
  }

  #key(event) {
    if (event.key === "Escape") return this.tooltip.hide();
    const oldest = this.steps.length - 1, at = this.chosen ?? 0;
    const moved = { ArrowLeft: at + 1, ArrowRight: at - 1, Home: oldest, End: 0 }[event.key];
    if (moved === undefined) return;
    event.preventDefault();
    this.#choose(Math.max(0, Math.min(oldest, moved)));
  }

  #choose(age) {
    if (!this.steps.length) return;
    this.chosen = age;
    const text = this.#describe(this.steps.at(-1 - age), age), edge = this.canvas.getBoundingClientRect();
    this.spoken.textContent = text;
    this.tooltip.show(text, edge.right - (age + 0.5) * (edge.width / MOST), edge.top);
    this.draw();
  }

  #leave() {
    this.chosen = null;
    this.spoken.textContent = "";
    this.tooltip.hide();
    this.draw();
  }

  #point(event) {
    const edge = this.canvas.getBoundingClientRect();
    const age = Math.floor((edge.right - event.clientX) / (edge.width / MOST));
    if (age < 0 || age >= this.steps.length) return this.tooltip.hide();
    this.tooltip.show(this.#describe(this.steps.at(-1 - age), age), event.clientX, event.clientY);
  }
}
