// What each expert is doing, from one /live event to the next. Nothing is drawn here.

export const STATES = ["hit", "miss", "resident", "loading", "absent", "predicted"];
// A hit or a miss is shown so long: steps are shorter than the time between two events, and nothing should flicker.
export const HELD_MS = 700;
const LOADING = 1, RESIDENT = 2;
const LIKELY = 0.5; // from here on an expert counts as predicted, as in the engine's own recall

export class Cells {
  constructor(event) {
    this.layers = event.layers;
    this.experts = event.experts;
    const size = this.layers * this.experts;
    this.hitAt = new Float64Array(size).fill(-Infinity);
    this.missAt = new Float64Array(size).fill(-Infinity);
    this.event = event;
    this.now = 0;
  }

  // Whether another event is of the same model and the same run of the server.
  continuesWith(event) {
    return event.layers === this.layers && event.experts === this.experts && event.time_s >= this.event.time_s
      && event.hits + event.misses >= this.event.hits + this.event.misses;
  }

  update(event, now) {
    const before = this.event;
    this.event = event;
    this.now = now;
    for (let layer = 0; layer < this.layers; layer++) {
      for (let expert = 0; expert < this.experts; expert++) {
        const used = value(event.uses_LE, layer, expert) - value(before.uses_LE, layer, expert);
        if (used <= 0) continue;
        const missed = value(event.misses_LE, layer, expert) - value(before.misses_LE, layer, expert);
        const at = layer * this.experts + expert;
        if (missed > 0) this.missAt[at] = now;
        if (used > missed) this.hitAt[at] = now;
      }
    }
  }

  // Layers may differ in their number of experts.
  exists(layer, expert) {
    return (this.event.resident_LE[layer]?.[expert] ?? -1) >= 0;
  }

  // Where its bytes are now: "resident", "loading" or "absent".
  place(layer, expert) {
    const held = this.event.resident_LE[layer][expert];
    return held === RESIDENT ? "resident" : held === LOADING ? "loading" : "absent";
  }

  // How it was found when it was needed a moment ago: "hit", "miss", or null when it was not needed.
  outcome(layer, expert) {
    const at = layer * this.experts + expert;
    if (this.now - this.missAt[at] < HELD_MS) return "miss";
    return this.now - this.hitAt[at] < HELD_MS ? "hit" : null;
  }

  probability(layer, expert) {
    return this.event.predicted_LE?.[layer]?.[expert] ?? null;
  }

  predicted(layer, expert) {
    return (this.probability(layer, expert) ?? 0) >= LIKELY;
  }

  count(name, layer, expert) {
    return value(this.event[`${name}_LE`], layer, expert);
  }

  most(name) {
    return Math.max(1, ...this.event[`${name}_LE`].map((row) => Math.max(...row)));
  }

  // How many experts of a layer are held and loading.
  held(layer) {
    const row = this.event.resident_LE[layer];
    return { resident: row.filter((held) => held === RESIDENT).length, loading: row.filter((held) => held === LOADING).length };
  }
}

function value(counts_LE, layer, expert) {
  return Math.max(0, counts_LE?.[layer]?.[expert] ?? 0);
}
