// Light, dark, or as the system has it.

const NEXT = { system: "light", light: "dark", dark: "system" };
const KEPT = "expertflow-theme";

export function themeButton(button, onChange) {
  let theme = localStorage.getItem(KEPT) ?? "system";
  const apply = () => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
    onChange();
  };
  button.addEventListener("click", () => {
    theme = NEXT[theme] ?? "system";
    localStorage.setItem(KEPT, theme);
    apply();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", onChange);
  apply();
}
