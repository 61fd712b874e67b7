// The one tooltip of the page: beside a point, within the window. Screen readers have the text from elsewhere.

export class Tooltip {
  constructor(element) {
    this.element = element;
    window.addEventListener("scroll", () => this.hide(), { capture: true, passive: true });
  }

  show(text, x, y) {
    const { element } = this;
    element.textContent = text;
    element.hidden = false;
    const { width, height } = element.getBoundingClientRect();
    element.style.left = `${Math.max(4, x + 14 + width > window.innerWidth ? x - width - 10 : x + 14)}px`;
    element.style.top = `${Math.max(4, y + 14 + height > window.innerHeight ? y - height - 10 : y + 14)}px`;
  }

  hide() {
    this.element.hidden = true;
  }
}
