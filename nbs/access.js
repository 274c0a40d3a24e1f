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

  // In a narrow window the contents of the page stand above the text, folded.
  const toc = document.getElementById("TOC"), heading = document.getElementById("toc-title");
  if (toc && heading) {
    const fold = Object.assign(document.createElement("button"), { className: "toc-fold", type: "button" });
    fold.textContent = heading.textContent;
    fold.setAttribute("aria-expanded", "false");
    fold.addEventListener("click", () => fold.setAttribute("aria-expanded", String(toc.classList.toggle("unfolded"))));
    heading.replaceChildren(fold);
  }

  // A table that is wider than its place becomes a list: each cell then has the heading of its column before it.
  function fit(table) {
    const heads = [...table.querySelectorAll("thead th")].map((th) => th.textContent.trim());
    table.classList.remove("as-list");
    if (!table.offsetParent || !heads.length) return;
    if (table.getBoundingClientRect().width <= table.parentElement.clientWidth + 1) return;
    for (const row of table.querySelectorAll("tbody tr"))
      [...row.cells].forEach((cell, i) => row.cells.length === heads.length && (cell.dataset.label = heads[i]));
    table.classList.add("as-list");
  }
  const fitAll = () => document.querySelectorAll("main table").forEach(fit);
  let width = 0;
  new ResizeObserver(() => { if (width !== (width = document.body.clientWidth)) fitAll(); }).observe(document.body);
  document.addEventListener("toggle", fitAll, true); // a fold that opens

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
