// Puts the views of a widget over the static HTML that a cell's output holds, while a kernel answers.
//
// The output itself has no widget in it: opened again without this kernel, it shows the HTML instead of an error. The HTML is
// found by a random id. Nothing here makes HTML out of text.

const FORGET = 60_000; // milliseconds after which the view of an output that is gone is removed

function initialize({ model, signal }) {
  const mount = model.get("mount");
  if (!mount || typeof document === "undefined") return;
  const manager = model.widget_manager;
  const selector = `[data-ft-mount="${CSS.escape(mount)}"]`;
  const shown = new Map(); // the element of the output -> {el, view, seen}
  const hello = Math.floor(Math.random() * 2 ** 40);
  let [due, over, here, dead] = [false, false, false, false];

  async function put(place) {
    const el = document.createElement("div");
    const entry = { el, view: null, seen: performance.now() };
    shown.set(place, entry);
    const child = await manager.get_model(model.get("view"));
    if (child.comm_live === false) {
      // The notebook was opened again in this page, after its kernel had ended.
      shown.delete(place);
      gone();
      return;
    }
    const view = await manager.create_view(child);
    if (over || !place.isConnected) {
      shown.delete(place);
      view.remove();
      return;
    }
    entry.view = view;
    for (const still of place.children) still.hidden = true;
    place.append(el);
    const widget = view.luminoWidget ?? view.pWidget;
    widget.constructor.attach(widget, el);
    // One of both is enough: the record that `run.start()` keeps in the same cell is hidden under a panel.
    place.closest(".jp-OutputArea")?.classList.add("ft-has-panel");
    name(el);
  }

  function take(place) {
    const { el, view } = shown.get(place);
    shown.delete(place);
    view?.remove();
    el.remove();
    for (const still of place.children) still.hidden = false;
    place.closest(".jp-OutputArea")?.classList.remove("ft-has-panel");
  }

  function scan() {
    if (manager.isDisposed) end(); // the notebook was closed; opened again, it gets a manager and a model of its own
    if (over || !here) return;
    const now = performance.now();
    for (const [place, entry] of shown) {
      if (place.isConnected) entry.seen = now;
      else if (now - entry.seen > FORGET) take(place);
    }
    for (const place of document.querySelectorAll(selector)) {
      if (!shown.has(place) && !dead) put(place).catch((error) => console.warn("finetune_nb: no panel here:", error));
    }
    for (const { el } of shown.values()) name(el);
  }

  // ipywidgets gives a slider no name that a screen reader could say.
  function name(el) {
    for (const handle of el.querySelectorAll(".noUi-handle:not([aria-label]), .widget-readout:not([aria-label])")) {
      const label = handle.closest(".jupyter-widgets")?.querySelector(".widget-label")?.textContent;
      if (!label) continue;
      handle.setAttribute("aria-label", handle.matches(".widget-readout") ? `${label}, as a number` : label);
      if (handle.matches(".widget-readout")) handle.setAttribute("role", "textbox");
    }
    for (const said of el.querySelectorAll(".ft-b-spoken .widget-html-content:not([role])")) said.setAttribute("role", "status");
  }

  const watch = new MutationObserver(() => {
    if (due) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      scan();
    });
  });

  // ── the kernel ──────────────────────────────────────────────────────────────────────────────────────────────────────

  function gone() {
    dead = true; // an output that comes from now on keeps its HTML
    for (const { el, view } of shown.values()) {
      if (!view || el.classList.contains("ft-gone")) continue;
      const said = document.createElement("div");
      said.className = "ft-gone-note";
      said.setAttribute("role", "alert");
      const code = document.createElement("code");
      code.textContent = model.get("again");
      said.append("The kernel of this panel has ended, and what was recorded is on the disk. To see it again: ", code);
      view.el.inert = true;
      el.classList.add("ft-gone");
      el.prepend(said);
    }
  }
  async function check() {
    try {
      const raw = await manager.get_model(mount);
      if (raw.comm_live === false) gone();
    } catch {
      gone();
    }
  }
  const kernel = manager?.kernel;
  const ended = (_, status) => {
    if (["dead", "terminating", "restarting", "autorestarting"].includes(status)) gone();
  };

  function end() {
    over = true;
    watch.disconnect();
    model.off("msg:custom", heard);
    kernel?.statusChanged?.disconnect(ended);
    kernel?.disposed?.disconnect(gone);
    for (const place of [...shown.keys()]) take(place);
  }
  function heard(content) {
    if (content.id !== hello || here) return;
    here = true;
    scan();
  }
  model.on("msg:custom", heard);
  model.on("comm:close", end);
  model.on("comm_live_update", check);
  signal?.addEventListener("abort", end);
  kernel?.statusChanged?.connect(ended);
  kernel?.disposed?.connect(gone);
  watch.observe(document.body, { childList: true, subtree: true });
  // A model may be restored from a file, without a kernel: the HTML stays until one has answered.
  model.send({ id: hello });
}

// For front ends that make a widget's page only where an output shows it.
async function render({ model, el }) {
  const child = await model.widget_manager.get_model(model.get("view"));
  const view = await model.widget_manager.create_view(child);
  el.append(view.el);
  return () => view.remove();
}

export default { initialize, render };
