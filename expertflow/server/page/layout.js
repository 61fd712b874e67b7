// Where the cells of the map lie. Layers are stacked; where they are many and short they stand in several columns, and
// where a layer has more experts than fit in a line it gets several lines.

export const LABEL = 26; // pixels for the number of a layer
export const STALL = 46; // and for how long it stalled
const GUTTER = 22; // between two columns
const LAYER_GAP = 3;
const LARGEST = 28, ROOMY = 12, SMALLEST = 4;
const WIDEST = 2.4; // width over height of a cell

export function layOut(layers, experts, width, height) {
  let best = null;
  for (let columns = 1; columns <= Math.min(4, layers); columns++) {
    const room = (width - (columns - 1) * GUTTER) / columns - LABEL - STALL;
    const rows = Math.ceil(layers / columns);
    for (let lines = 1; lines <= experts; lines++) {
      const perLine = Math.ceil(experts / lines);
      const wide = room / perLine;
      if (wide < SMALLEST && lines < experts) continue;
      const gap = lines > 1 ? LAYER_GAP + 2 : rows > 1 ? 1 : 0;
      // What does not fit in the height scrolls, rather than becoming too small to see.
      const tall = Math.max(SMALLEST, Math.min(LARGEST, (height / rows - gap) / lines));
      const cellHeight = Math.min(tall, wide * 1.15);
      const cellWidth = Math.min(wide, cellHeight * WIDEST);
      const fits = rows * (lines * cellHeight + gap) <= height + 1;
      const score = Math.min(cellWidth, cellHeight) * (fits ? 1 : 0.8) - 0.8 * (columns - 1) - 0.5 * (lines - 1);
      if (!best || score > best.score) best = { score, columns, rows, lines, perLine, cellWidth, cellHeight, gap };
      if (Math.min(cellWidth, cellHeight) >= ROOMY) break; // more lines would only tear layers apart
    }
  }
  const pitch = best.lines * best.cellHeight + best.gap;
  const block = LABEL + best.perLine * best.cellWidth + STALL;
  return { ...best, layers, experts, pitch, block, height: Math.ceil(best.rows * pitch) };
}

// The upper left corner of a layer's cells.
export function origin(layout, layer) {
  const column = Math.floor(layer / layout.rows);
  return { x: column * (layout.block + GUTTER) + LABEL, y: (layer % layout.rows) * layout.pitch };
}

export function corner(layout, layer, expert) {
  const { x, y } = origin(layout, layer);
  const line = Math.floor(expert / layout.perLine);
  return { x: x + (expert % layout.perLine) * layout.cellWidth, y: y + line * layout.cellHeight };
}

// The cell at a point, or null.
export function cellAt(layout, x, y) {
  const column = Math.floor(x / (layout.block + GUTTER));
  const row = Math.floor(y / layout.pitch);
  const layer = column * layout.rows + row;
  if (column < 0 || column >= layout.columns || row < 0 || row >= layout.rows || layer >= layout.layers) return null;
  const at = origin(layout, layer);
  const along = Math.floor((x - at.x) / layout.cellWidth), line = Math.floor((y - at.y) / layout.cellHeight);
  if (along < 0 || along >= layout.perLine || line < 0 || line >= layout.lines) return null;
  const expert = line * layout.perLine + along;
  return expert < layout.experts ? { layer, expert } : null;
}
