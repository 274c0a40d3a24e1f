// For readers who use a keyboard or a screen reader: a link that skips the navigation, and sliders and buttons with names.
document.addEventListener("DOMContentLoaded", () => {
  const main = document.querySelector("main");
  if (main) {
    main.id ||= "main";
    const skip = Object.assign(document.createElement("a"), { className: "skip-link", href: "#" + main.id });
    skip.textContent = "Skip to the text";
    skip.addEventListener("click", () => { main.tabIndex = -1; main.focus(); });
    document.body.prepend(skip);
  }

  // A slider of ipywidgets has its name and its value beside it, and the element that takes the focus has neither.
  function name(row) {
    const handle = row.querySelector(".noUi-handle");
    const label = row.querySelector(".widget-label")?.textContent, value = row.querySelector(".widget-readout")?.textContent;
    const set = (element, key, text) => text && element.getAttribute(key) !== text && element.setAttribute(key, text);
    if (handle) { set(handle, "aria-label", label); set(handle, "aria-valuetext", value); }
    if (row.classList.contains("widget-toggle-buttons")) { set(row, "role", "group"); set(row, "aria-label", label); }
  }
  const nameAll = () => 
    document.querySelectorAll(".steer-control .widget-inline-hbox, .steer-control .widget-toggle-buttons").forEach(name);
  new MutationObserver(nameAll).observe(document.body, {
    subtree: true, childList: true, characterData: true, attributeFilter: ["aria-valuetext"],
  });
  nameAll();
});
