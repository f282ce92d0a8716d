// Puts views over the static HTML that a cell's output holds, while a kernel answers.
//
// The output itself has no widget in it: opened again without this kernel, it shows the HTML instead of an error. The HTML is
// found by a random id. Nothing here makes HTML out of text. A widget has one module, so this text stands at the
// beginning of each that uses it (mount.py).

const FORGET = 60_000; // milliseconds after which the view of an output that is gone is removed
const ENDED = ["dead", "terminating", "restarting", "autorestarting"]; // states of a kernel whose widgets are lost

/** Calls `gone` when no kernel is behind the model any more. Gives the function that ends the watch. All but "msg:custom" are
 * ipywidgets' own events, which other hosts may not have. */
function watchKernel(model, gone) {
  const manager = model.widget_manager;
  const kernel = manager?.kernel;
  const check = async () => {
    try {
      const raw = await manager?.get_model(model.get("mount"));
      if (raw && raw.comm_live === false) gone();
    } catch {
      gone();
    }
  };
  const changed = (_, status) => ENDED.includes(status) && gone();
  const closed = () => gone();
  model.on("comm_live_update", check);
  for (const name of ["comm:close", "destroy"]) model.on(name, closed);
  kernel?.statusChanged?.connect(changed);
  kernel?.disposed?.connect(closed);
  return () => {
    model.off("comm_live_update", check);
    for (const name of ["comm:close", "destroy"]) model.off(name, closed);
    kernel?.statusChanged?.disconnect(changed);
    kernel?.disposed?.disconnect(closed);
  };
}

/** Keeps keys from the shortcuts of the notebook while `el` has the focus: those for which `isOurs(event)`, and none with Ctrl,
 * Meta or Alt. JupyterLab listens on the document, Notebook 7 in the capture phase. Gives the function that ends it. */
function keepKeys(el, isOurs) {
  const guard = (event) => {
    if (!event.composedPath().includes(el)) return;
    event.target.toggleAttribute("data-lm-suppress-shortcuts", !(event.ctrlKey || event.metaKey || event.altKey) && isOurs(event));
  };
  window.addEventListener("keydown", guard, true);
  return () => window.removeEventListener("keydown", guard, true);
}

/** Puts a view over each element that has the model's id, wherever it is shown. A model may have been restored from a file, or
 * be left over from a notebook that was closed: each place keeps its HTML until a kernel has answered for it.
 *
 * show(): a view, or a promise of one; null if nothing is there to be shown. It has attach(el), which is called once `el` is in
 * the page, remove(el), and perhaps gone(el), for when the kernel has ended, and tidy(el), for when the page has changed. */
function mountOver({ model, signal }, show) {
  const mount = model.get("mount");
  if (!mount || typeof document === "undefined") return;
  const selector = `[data-ft-mount="${CSS.escape(mount)}"]`;
  const places = new Map(); // the element of an output -> {el, view, seen}, without a view until that is there
  const asked = new Map(); // id of a question -> the element it is about
  let next = Math.floor(Math.random() * 2 ** 40); // several pages hear each other's answers
  let [due, over, dead] = [false, false, false];

  function scan() {
    if (model.widget_manager?.isDisposed) end(); // the notebook was closed; opened again, it gets a model of its own
    if (over) return;
    const now = performance.now();
    for (const [place, entry] of places) {
      if (place.isConnected) entry.seen = now;
      else if (now - entry.seen > FORGET) take(place);
    }
    for (const place of document.querySelectorAll(selector)) {
      if (places.has(place) || dead) continue;
      places.set(place, { seen: now });
      asked.set(++next, place);
      try {
        model.send({ id: next, op: "ready" });
      } catch {
        return; // its channel is closed
      }
    }
    for (const { el, view } of places.values()) view?.tidy?.(el);
  }

  function heard(content) {
    const place = asked.get(content.id);
    asked.delete(content.id);
    if (place && !over) put(place).catch((error) => console.warn("finetune_nb: no view here:", error));
  }

  async function put(place) {
    const entry = places.get(place);
    if (!entry) return;
    const view = await show();
    if (!view) return gone();
    if (over || dead || !place.isConnected || places.get(place) !== entry) {
      if (places.get(place) === entry) places.delete(place);
      return view.remove();
    }
    for (const still of place.children) still.hidden = true;
    const el = document.createElement("div");
    place.append(el);
    Object.assign(entry, { el, view });
    view.attach(el);
    view.tidy?.(el);
  }

  function take(place) {
    const { el, view } = places.get(place);
    places.delete(place);
    view?.remove(el);
    el?.remove();
    for (const still of place.children) still.hidden = false;
  }

  function gone() {
    dead = true; // an output that comes from now on keeps its HTML
    for (const { el, view } of places.values()) view?.gone?.(el);
  }

  function end() {
    over = true;
    watch.disconnect();
    clearInterval(timer);
    unwatch();
    model.off("msg:custom", heard);
    model.off("comm:close", end);
    for (const place of [...places.keys()]) take(place);
  }

  const watch = new MutationObserver(() => {
    if (due) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      scan();
    });
  });
  const unwatch = watchKernel(model, gone);
  const timer = setInterval(scan, FORGET / 4); // a page in which nothing changes
  model.on("msg:custom", heard);
  model.on("comm:close", end);
  signal?.addEventListener("abort", end);
  watch.observe(document.body, { childList: true, subtree: true });
  scan();
}
