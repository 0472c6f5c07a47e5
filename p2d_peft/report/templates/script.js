"use strict";
// Light and dark: the reader's system decides until the button is pressed.
const body = document.body;
const button = document.getElementById("theme");
const isDark = () => body.dataset.theme
  ? body.dataset.theme === "dark"
  : matchMedia("(prefers-color-scheme: dark)").matches;
const label = () => { button.textContent = isDark() ? "Light" : "Dark"; };
button.addEventListener("click", () => {
  body.dataset.theme = isDark() ? "light" : "dark";
  label();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
button.hidden = false;
label();

// What a mark stands for, beside the pointer or where a finger was. Always as text, never as markup.
const tip = document.getElementById("tip");
const said = (element) => {
  if (element.dataset.tip) return element.dataset.tip;
  const layer = element.parentElement.cells[0].textContent;
  return `layer ${layer}, head ${element.cellIndex - 1}\n${element.textContent}`;
};
document.addEventListener("pointermove", (event) => {
  const element = event.target.closest("[data-tip], .map td:not(.none)");
  tip.hidden = !element;
  if (!element) return;
  tip.textContent = said(element);
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 4))}px`;
  tip.style.top = `${event.clientY + height + 24 > innerHeight ? event.clientY - height - 12 : event.clientY + 16}px`;
});
document.addEventListener("pointerdown", (event) => event.target.dispatchEvent(
  new PointerEvent("pointermove", { bubbles: true, clientX: event.clientX, clientY: event.clientY })));
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
