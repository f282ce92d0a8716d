// The control panel's page side: its widgets, over the static panel in the output. It begins with mount.js.

// What moves a slider, presses a button and opens a list.
const KEYS = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "PageUp", "PageDown", "Home", "End", "Enter", " "];

async function panelView(model) {
  const manager = model.widget_manager;
  const child = await manager.get_model(model.get("view"));
  if (child.comm_live === false) return null; // the notebook was opened again in this page, after its kernel had ended
  const view = await manager.create_view(child);
  let giveKeysBack;
  return {
    attach(el) {
      giveKeysBack = keepKeys(el, (event) => !event.shiftKey && KEYS.includes(event.key));
      const widget = view.luminoWidget ?? view.pWidget;
      widget.constructor.attach(widget, el);
      // One of both is enough: the record that `run.start()` keeps in the same cell is hidden under a panel.
      el.closest(".jp-OutputArea")?.classList.add("ft-has-panel");
    },
    remove(el) {
      giveKeysBack?.();
      view.remove();
      el?.closest(".jp-OutputArea")?.classList.remove("ft-has-panel");
    },
    gone(el) {
      if (el.classList.contains("ft-gone")) return;
      const said = document.createElement("div");
      said.className = "ft-gone-note";
      said.setAttribute("role", "alert");
      const code = document.createElement("code");
      code.textContent = model.get("again");
      said.append("The kernel of this panel has ended, and what was recorded is on the disk. To see it again: ", code);
      view.el.inert = true;
      el.classList.add("ft-gone");
      el.prepend(said);
    },
    // ipywidgets gives a slider no name that a screen reader could say.
    tidy(el) {
      for (const handle of el.querySelectorAll(".noUi-handle:not([aria-label]), .widget-readout:not([aria-label])")) {
        const label = handle.closest(".jupyter-widgets")?.querySelector(".widget-label")?.textContent;
        if (!label) continue;
        handle.setAttribute("aria-label", handle.matches(".widget-readout") ? `${label}, as a number` : label);
        if (handle.matches(".widget-readout")) handle.setAttribute("role", "textbox");
      }
      for (const said of el.querySelectorAll(".ft-b-spoken .widget-html-content:not([role])")) said.setAttribute("role", "status");
    },
  };
}

// For front ends that make a widget's page only where an output shows it.
async function render({ model, el }) {
  const child = await model.widget_manager.get_model(model.get("view"));
  const view = await model.widget_manager.create_view(child);
  el.append(view.el);
  return () => view.remove();
}

export default { initialize: (given) => mountOver(given, () => panelView(given.model)), render };
