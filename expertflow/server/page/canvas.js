// A canvas as large as its element in device pixels, and the colours of the page's style sheet.

export function prepare(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  const wide = Math.round(width * scale), tall = Math.round(height * scale);
  if (canvas.width !== wide || canvas.height !== tall) {
    canvas.width = wide;
    canvas.height = tall;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

const NAMES = ["absent", "resident", "hit", "miss", "loading", "predicted", "muted", "line", "panel", "accent", "ink"];

// light-dark() in a custom property becomes a colour only where it is used, so it is used on an element.
export function colours() {
  const probe = document.createElement("i");
  document.body.append(probe);
  const found = {};
  for (const name of NAMES) {
    probe.style.color = `var(--${name})`;
    found[name] = getComputedStyle(probe).color;
  }
  probe.remove();
  return found;
}
