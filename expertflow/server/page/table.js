// The map in words: a table of the layers, filled while somebody has it open.

import { count, seconds } from "./words.js";

const EVERY_MS = 2000; // a screen reader in the middle of a row should be able to finish it

export function layerTable(details) {
  const body = details.querySelector("tbody");
  let cells = null, filledAt = -Infinity;
  const fill = () => {
    filledAt = performance.now();
    const { event } = cells;
    while (body.rows.length > cells.layers) body.deleteRow(-1);
    for (let layer = 0; layer < cells.layers; layer++) {
      const row = body.rows[layer] ?? newRow(body, layer);
      const held = cells.held(layer), sum = (counts_LE) => counts_LE[layer].reduce((total, n) => total + Math.max(0, n), 0);
      const values = [held.resident, held.loading, sum(event.uses_LE), sum(event.loads_LE)].map(count);
      [...values, seconds(event.stall_by_layer[layer] ?? 0)].forEach((text, index) => {
        row.cells[index + 1].textContent = text;
      });
    }
  };
  details.addEventListener("toggle", () => details.open && cells && fill());
  return (newest) => {
    cells = newest;
    if (details.open && performance.now() - filledAt > EVERY_MS) fill();
  };
}

function newRow(body, layer) {
  const row = body.insertRow(), heading = document.createElement("th");
  heading.scope = "row";
  heading.textContent = layer;
  row.append(heading);
  for (let column = 0; column < 5; column++) row.insertCell();
  return row;
}
