// The map of layers by experts: drawn on a canvas, read by pointer, arrow keys and screen reader.

import { colours, prepare } from "./canvas.js";
import { HELD_MS, STATES } from "./cells.js";
import { LABEL, STALL, cellAt, corner, layOut, origin } from "./layout.js";
import { bytes, count, percent, plural, seconds } from "./words.js";

const SHAPED = 6; // pixels from which a cell shows a shape as well
const NAMES = {
  hit: "hit", miss: "miss", resident: "in memory", loading: "loading", absent: "not in memory", predicted: "predicted",
};

const EXAMPLES = {
  hit: { place: "resident", outcome: "hit" }, miss: { place: "absent", outcome: "miss" }, resident: { place: "resident" },
  loading: { place: "loading" }, absent: { place: "absent" }, predicted: { place: "absent", predicted: true },
};

export class HeatMap {
  constructor({ box, legend, summary, spoken, tooltip }) {
    Object.assign(this, { box, legend, summary, spoken, tooltip });
    this.canvas = box.querySelector("canvas");
    this.view = "now";
    this.standsOut = null; // a state, or null: all of them
    this.cells = null;
    this.chosen = null; // the cell of the arrow keys
    box.addEventListener("keydown", (event) => this.#key(event));
    box.addEventListener("blur", () => this.#leave());
    box.addEventListener("focus", () => this.#focus());
    box.addEventListener("pointermove", (event) => this.#point(event));
    box.addEventListener("pointerleave", () => this.tooltip.hide());
    new ResizeObserver(() => this.draw()).observe(box);
    this.restyle();
  }

  restyle() {
    this.colours = colours();
    this.#drawLegend();
    this.draw();
  }

  show(view) {
    this.view = view;
    this.#drawLegend();
    this.draw();
  }

  update(cells) {
    if (this.cells && (cells.layers !== this.cells.layers || cells.experts !== this.cells.experts)) this.chosen = null;
    this.cells = cells;
    this.draw();
    this.#summarise();
    // The server is silent while nothing happens; what was a moment ago is to go by then.
    clearTimeout(this.fading);
    this.fading = setTimeout(() => {
      cells.now = performance.now();
      this.draw();
    }, HELD_MS + 20);
  }

  draw() {
    const width = this.box.clientWidth;
    if (!this.cells || !width) return;
    this.layout = layOut(this.cells.layers, this.cells.experts, width, Math.max(260, 0.42 * window.innerHeight));
    const context = prepare(this.canvas, width, this.layout.height);
    const most = this.view === "now" ? 1 : this.cells.most(this.view);
    const slowest = Math.max(1e-9, ...this.cells.event.stall_by_layer);
    for (let layer = 0; layer < this.cells.layers; layer++) {
      this.#drawMargin(context, layer, slowest);
      for (let expert = 0; expert < this.cells.experts; expert++) {
        if (this.cells.exists(layer, expert)) this.#drawCell(context, layer, expert, most);
      }
    }
    if (this.chosen) this.#frame(context, this.chosen);
  }

  #drawCell(context, layer, expert, most) {
    const { x, y } = corner(this.layout, layer, expert);
    const { cellWidth: width, cellHeight: height } = this.layout;
    if (this.view !== "now") {
      // Square root: what is used twice as often as most shall not drown the rest.
      const share = Math.sqrt(this.cells.count(this.view, layer, expert) / most);
      fill(context, x, y, width, height, this.colours.absent);
      context.globalAlpha = share;
      fill(context, x, y, width, height, this.colours.hit);
      context.globalAlpha = 1;
      return;
    }
    const place = this.cells.place(layer, expert), outcome = this.cells.outcome(layer, expert);
    const predicted = this.cells.predicted(layer, expert);
    const dimmed = this.standsOut && ![place, outcome, predicted && "predicted"].includes(this.standsOut);
    context.globalAlpha = dimmed ? 0.18 : 1;
    paint(context, x, y, width, height, { place, outcome, predicted }, this.colours);
    context.globalAlpha = 1;
  }

  #drawMargin(context, layer, slowest) {
    const { x, y } = origin(this.layout, layer);
    const { perLine, cellWidth, lines, cellHeight, pitch } = this.layout;
    const tall = lines * cellHeight, step = Math.ceil(12 / pitch); // numbers are 12 pixels tall
    context.fillStyle = this.colours.muted;
    if (layer % step === 0) {
      context.font = "11px system-ui, sans-serif";
      context.textAlign = "right";
      context.textBaseline = "middle";
      context.fillText(String(layer), x - 7, y + Math.min(tall, 16) / 2 + 0.5);
    }
    const stall = this.cells.event.stall_by_layer[layer] ?? 0;
    const long = ((STALL - 12) * stall) / slowest;
    if (stall > 0) {
      context.fillStyle = this.colours.miss;
      context.globalAlpha = 0.75;
      context.fillRect(x + perLine * cellWidth + 8, y + tall / 2 - 1.5, Math.max(1, long), Math.min(3, tall));
      context.globalAlpha = 1;
    }
  }

  #frame(context, { layer, expert }) {
    const { x, y } = corner(this.layout, layer, expert);
    context.strokeStyle = this.colours.accent;
    context.lineWidth = 2;
    context.strokeRect(x - 1, y - 1, this.layout.cellWidth + 1, this.layout.cellHeight + 1);
  }

  #drawLegend() {
    if (this.view !== "now") {
      const [none, ramp, most] = ["span", "span", "span"].map((tag) => document.createElement(tag));
      none.textContent = "never";
      most.textContent = this.view === "uses" ? "used most often" : "read most often";
      ramp.className = "ramp";
      this.legend.replaceChildren(none, ramp, most);
      return;
    }
    this.legend.replaceChildren(...STATES.map((state) => this.#legendButton(state)));
  }

  #legendButton(state) {
    const button = document.createElement("button"), swatch = document.createElement("canvas");
    button.type = "button";
    button.setAttribute("aria-pressed", String(this.standsOut === state));
    swatch.setAttribute("aria-hidden", "true");
    button.append(swatch, NAMES[state]);
    paint(prepare(swatch, 16, 16), 0, 0, 17, 17, EXAMPLES[state], this.colours);
    button.addEventListener("click", () => {
      this.standsOut = this.standsOut === state ? null : state;
      for (const other of this.legend.children) other.setAttribute("aria-pressed", String(other === button && this.standsOut !== null));
      this.draw();
    });
    return button;
  }

  #summarise() {
    const { event, layers } = this.cells;
    let resident = 0, loading = 0;
    for (let layer = 0; layer < layers; layer++) {
      const held = this.cells.held(layer);
      resident += held.resident;
      loading += held.loading;
    }
    const slowest = event.stall_by_layer.indexOf(Math.max(...event.stall_by_layer));
    const stall = event.stall_by_layer[slowest] ?? 0;
    this.summary.textContent = `${plural(resident, "expert")} in memory, ${count(loading)} loading`
      + (stall > 0 ? `; layer ${slowest} stalled longest, ${seconds(stall)} (bars at the right)` : "");
  }

  describe({ layer, expert }) {
    const cells = this.cells, probability = cells.probability(layer, expert);
    const outcome = cells.outcome(layer, expert), place = NAMES[cells.place(layer, expert)];
    const lines = [
      `Layer ${layer}, expert ${expert}: ${place}${outcome ? `, just a ${outcome}` : ""}`,
      `used ${times(cells.count("uses", layer, expert))}, missed ${times(cells.count("misses", layer, expert))}, `
        + `read ${times(cells.count("loads", layer, expert))}`,
    ];
    if (probability !== null) lines.push(`predicted at ${percent(probability)}`);
    lines.push(bytes(cells.event.slot_bytes));
    return lines.join("\n");
  }

  #key(event) {
    if (event.key === "Escape") return this.tooltip.hide();
    if (!this.cells) return;
    const { layers, experts } = this.cells;
    const at = this.chosen ?? { layer: 0, expert: 0 };
    const moved = {
      ArrowLeft: { layer: at.layer, expert: at.expert - 1 },
      ArrowRight: { layer: at.layer, expert: at.expert + 1 },
      ArrowUp: { layer: at.layer - 1, expert: at.expert },
      ArrowDown: { layer: at.layer + 1, expert: at.expert },
      Home: { layer: event.ctrlKey ? 0 : at.layer, expert: 0 },
      End: { layer: event.ctrlKey ? layers - 1 : at.layer, expert: experts - 1 },
    }[event.key];
    if (!moved) return;
    event.preventDefault();
    const within = moved.layer >= 0 && moved.layer < layers && moved.expert >= 0 && moved.expert < experts;
    if (within && this.cells.exists(moved.layer, moved.expert)) this.chosen = moved;
    this.#tellChosen();
  }

  #focus() {
    // A pointer shows what it points at by itself.
    if (!this.cells || !this.box.matches(":focus-visible")) return;
    this.chosen ??= { layer: 0, expert: 0 };
    this.#tellChosen();
  }

  #leave() {
    this.chosen = null;
    this.spoken.textContent = "";
    this.tooltip.hide();
    this.draw();
  }

  #tellChosen() {
    if (!this.chosen) return;
    const text = this.describe(this.chosen), { x, y } = corner(this.layout, this.chosen.layer, this.chosen.expert);
    this.spoken.textContent = text;
    if (y < this.box.scrollTop || y + this.layout.cellHeight > this.box.scrollTop + this.box.clientHeight) {
      this.box.scrollTop = y - this.box.clientHeight / 2;
    }
    const edge = this.canvas.getBoundingClientRect();
    this.tooltip.show(text, edge.left + x + this.layout.cellWidth, edge.top + y + this.layout.cellHeight);
    this.draw();
  }

  #point(event) {
    if (!this.cells || !this.layout) return;
    const edge = this.canvas.getBoundingClientRect();
    const cell = cellAt(this.layout, event.clientX - edge.left, event.clientY - edge.top);
    if (!cell || !this.cells.exists(cell.layer, cell.expert)) return this.tooltip.hide();
    this.tooltip.show(this.describe(cell), event.clientX, event.clientY);
  }
}

const times = (n) => (n === 1 ? "once" : n ? `${count(n)} times` : "never");

function fill(context, x, y, width, height, colour) {
  const gap = Math.min(width, height) >= 12 ? 2 : Math.min(width, height) >= 5 ? 1 : 0.5;
  context.fillStyle = colour;
  context.beginPath();
  context.roundRect(x, y, width - gap, height - gap, Math.min(width, height) >= 10 ? 2.5 : 0);
  context.fill();
  return [width - gap, height - gap];
}

// One cell. The fill says where the bytes are, by lightness; loading is striped. What was needed a moment ago has a dot
// (hit) or a cross (miss); where there is no room for them a hit fills its cell and a miss the lower half. A prediction is
// a frame.
export function paint(context, x, y, width, height, { place, outcome, predicted }, colours) {
  const shaped = Math.min(width, height) >= SHAPED;
  let base = place === "loading" ? "absent" : place;
  if (outcome === "hit" && (!shaped || place === "resident")) base = outcome;
  const [wide, tall] = fill(context, x, y, width, height, colours[base]);
  const small = Math.min(wide, tall);
  context.lineWidth = small >= 10 ? 2 : 1;
  if (place === "loading" && base !== outcome) {
    context.strokeStyle = colours.loading;
    context.beginPath();
    for (let offset = shaped ? 3 : 2; offset < wide + tall; offset += shaped ? 4 : 3) {
      context.moveTo(x + Math.min(offset, wide), y + Math.max(0, offset - wide));
      context.lineTo(x + Math.max(0, offset - tall), y + Math.min(offset, tall));
    }
    context.lineWidth = 1;
    context.stroke();
  }
  if (outcome === "miss" && !shaped) {
    context.fillStyle = colours.miss;
    context.fillRect(x, y + tall / 2, wide, tall / 2);
  } else if (outcome && shaped) mark(context, x + wide / 2, y + tall / 2, small, outcome, colours[base === outcome ? "panel" : outcome]);
  if (predicted) {
    context.strokeStyle = colours.predicted;
    context.lineWidth = small >= 10 ? 1.5 : 1;
    const inset = context.lineWidth / 2;
    context.strokeRect(x + inset, y + inset, wide - 2 * inset, tall - 2 * inset);
  }
}

function mark(context, x, y, small, outcome, colour) {
  context.strokeStyle = context.fillStyle = colour;
  context.beginPath();
  if (outcome === "hit") {
    context.arc(x, y, Math.max(1, small * 0.16), 0, 7);
    context.fill();
    return;
  }
  const arm = small * 0.26;
  for (const way of [1, -1]) {
    context.moveTo(x - arm, y - way * arm);
    context.lineTo(x + arm, y + way * arm);
  }
  context.lineWidth = small >= 10 ? 2.25 : 1.25;
  context.stroke();
}
