// The five figures at the top, each with a line of its last minute.

import { bytes, count, digits, percent, seconds } from "./words.js";

const KEPT_S = 60, SHORTEST_S = 10; // what a line shows, and at least
const RECENT_S = 10;
const SVG = "http://www.w3.org/2000/svg";
const TITLES = { speed: "Tokens per second", hits: "Hit ratio", link: "Link", stall: "Stalled", predictor: "Predictor recall" };

export class Figures {
  constructor(list) {
    this.parts = {};
    this.history = []; // events of the last minute, without their matrices
    for (const [name, title] of Object.entries(TITLES)) {
      const box = document.createElement("div");
      const term = document.createElement("dt"), value = document.createElement("dd"), note = document.createElement("dd");
      const line = document.createElementNS(SVG, "svg"), points = document.createElementNS(SVG, "polyline");
      term.textContent = title;
      value.textContent = "–";
      value.className = "value";
      value.id = `figure-${name}`;
      note.className = "note";
      line.setAttribute("viewBox", "0 0 100 20");
      line.setAttribute("preserveAspectRatio", "none");
      line.setAttribute("aria-hidden", "true");
      line.append(points);
      const drawn = document.createElement("dd");
      drawn.append(line);
      drawn.setAttribute("aria-hidden", "true");
      box.append(term, value, note, drawn);
      list.append(box);
      this.parts[name] = { value, note, points };
    }
  }

  restart() {
    this.history = [];
  }

  update(event) {
    const { time_s, hits, misses, tokens_per_s, link_bytes_per_s, stall_seconds, predictor } = event;
    const before = this.history.at(-1);
    const needed = before ? hits + misses - before.hits - before.misses : 0;
    const now = {
      time_s, hits, misses, tokens_per_s, link_bytes_per_s, stall_seconds,
      ratio: needed > 0 ? (hits - before.hits) / needed : null,
      stalled: stalledShare(event.steps),
      recall: predictor?.recall ?? null,
    };
    this.history.push(now);
    while (this.history[0].time_s < time_s - KEPT_S) this.history.shift();
    this.#say("speed", [digits(tokens_per_s), ""], `${count(event.running)} running, ${count(event.waiting)} waiting`);
    this.#say("hits", hits + misses ? split(percent(event.hit_ratio)) : ["–", ""], this.#recentHits(now));
    this.#say("link", split(`${bytes(link_bytes_per_s)}/s`), `${bytes(event.bytes_read)} read`);
    this.#say("stall", now.stalled === null ? ["–", ""] : split(percent(now.stalled)), `${seconds(stall_seconds)} in all`);
    if (predictor) this.#say("predictor", split(percent(predictor.recall)), `precision ${percent(predictor.precision)}`);
    else this.#say("predictor", ["–", ""], "no predictor");
    const lines = { speed: "tokens_per_s", hits: "ratio", link: "link_bytes_per_s", stall: "stalled", predictor: "recall" };
    for (const [name, field] of Object.entries(lines)) this.#line(name, field);
  }

  #recentHits(now) {
    const since = this.history.find((one) => one.time_s >= now.time_s - RECENT_S);
    const needed = now.hits + now.misses - since.hits - since.misses;
    return needed > 0 ? `${percent((now.hits - since.hits) / needed)} lately` : `${count(now.hits)} hits`;
  }

  #say(name, [value, unit], note) {
    const part = this.parts[name], small = document.createElement("small");
    small.textContent = unit && ` ${unit}`;
    part.value.replaceChildren(value, small);
    part.note.textContent = part.note.title = note;
  }

  #line(name, field) {
    const known = this.history.filter((one) => one[field] !== null);
    // A share is drawn between 0 and 1, all else up to the highest of the minute.
    const share = ["ratio", "stalled", "recall"].includes(field);
    const top = share ? 1 : Math.max(1e-9, ...known.map((one) => one[field]));
    const end = this.history.at(-1).time_s, span = Math.max(SHORTEST_S, end - this.history[0].time_s);
    const points = known.map((one) => `${(100 * (1 - (end - one.time_s) / span)).toFixed(2)},${(19 - 18 * (one[field] / top)).toFixed(2)}`);
    this.parts[name].points.setAttribute("points", points.join(" "));
  }
}

function stalledShare(steps) {
  const whole = steps.reduce((total, step) => total + step.seconds, 0);
  return whole > 0 ? steps.reduce((total, step) => total + step.stall_seconds, 0) / whole : null;
}

function split(text) {
  const space = text.lastIndexOf(" ");
  return [text.slice(0, space), text.slice(space + 1)];
}
