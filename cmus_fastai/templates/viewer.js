/* The image viewer: opens the images of a case page large. `OpenSeadragon` is defined before this text.
   The page says which images there are; their pixels, at full resolution, come from Python on request. */

const KEPT_IMAGES = 48;
const WIDEST_SCALE_BAR = 140; // px
const HELP = [
  ["← →", "previous or next patient"],
  ["↑ ↓", "previous or next image"],
  ["1 … 9", "TEM image 1 to 9"],
  ["Enter, click", "open an image"],
  ["wheel, pinch, + −", "zoom"],
  ["drag", "move the image"],
  ["0", "whole image"],
  ["a", "all images of this modality, or one"],
  ["l", "zoom and move all of them together, or each alone"],
  ["o", "overlay on or off"],
  ["d", "outlines of known lesions on or off"],
  ["f", "full screen"],
  ["?", "this list"],
  ["Esc", "close"],
];

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/* The largest of 1, 2, 5, 10, 20 … that is not above a length. */
function roundDown(length) {
  const power = 10 ** Math.floor(Math.log10(length));
  const digit = [5, 2, 1].find((d) => d * power <= length);
  return digit * power;
}

function lengthText(nm) {
  return nm >= 1000 ? `${nm / 1000} µm` : `${nm} nm`;
}

/* The outlines of lesions, as a drawing that keeps its line width at every zoom. */
function lesionDrawing(outlines) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 1 1");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("class", "lesions");
  for (const points of outlines) {
    const line = document.createElementNS(space, "polygon");
    line.setAttribute("points", points.map((point) => point.join(",")).join(" "));
    line.setAttribute("vector-effect", "non-scaling-stroke");
    svg.append(line);
  }
  return svg;
}

/* One image with its name, scale bar and overlays. */
class Pane {
  constructor(image, viewer) {
    this.image = image;
    this.viewer = viewer;
    this.canvas = make("div", { className: "canvas" });
    this.bar = make("div", { className: "scale-bar", hidden: true });
    this.text = make("p", { className: "message", textContent: "Loading …" });
    const name = make("figcaption", { textContent: image.name, hidden: !viewer.state.all });
    this.element = make("figure", { className: "pane" }, this.canvas, this.text, this.bar, name);
  }

  async load() {
    try {
      this.details = await this.viewer.fetch(this.image);
    } catch (error) {
      this.text.textContent = error.message;
      return;
    }
    if (this.element.isConnected) this.show();
  }

  show() {
    const osd = OpenSeadragon({
      element: this.canvas,
      drawer: "canvas",
      tileSources: { type: "image", url: this.details.url },
      showNavigationControl: false,
      showNavigator: this.viewer.panes.length === 1 && window.innerWidth > 700,
      navigatorPosition: "BOTTOM_RIGHT",
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      minZoomImageRatio: 0.7,
      visibilityRatio: 0.4,
      animationTime: 0.25,
    });
    this.osd = osd;
    osd.addHandler("canvas-key", (event) => { event.preventDefaultAction = true; });
    osd.addHandler("open", () => this.drawOverlays());
    osd.addHandler("update-viewport", () => this.drawScaleBar());
    for (const name of ["canvas-enter", "canvas-press", "canvas-scroll", "canvas-pinch"]) {
      osd.addHandler(name, () => { this.viewer.leader = this; });
    }
    osd.addHandler("viewport-change", () => this.viewer.follow(this));
  }

  /* Attribution and lesions lie over the image and follow it. */
  drawOverlays() {
    this.text.remove();
    const item = this.osd.world.getItemAt(0);
    const { x: width, y: height } = item.getContentSize();
    const fits = this.element.clientHeight / height;
    this.osd.viewport.maxZoomPixelRatio = Math.max(8, 4 * fits); // a small image can be enlarged, too
    const place = ([x, y, w, h]) => item.imageToViewportRectangle(x * width, y * height, w * width, h * height);
    if (this.image.heat) {
      const heat = make("img", { src: this.image.heat, className: "heat", alt: "" });
      this.osd.addOverlay({ element: heat, location: place(this.details.square) });
    }
    if (this.details.lesions.length) {
      this.osd.addOverlay({ element: lesionDrawing(this.details.lesions), location: place([0, 0, 1, 1]) });
    }
    this.element.dataset.ready = "";
    this.viewer.refresh();
  }

  drawScaleBar() {
    const item = this.osd.world.getItemAt(0);
    if (!item || !this.details.nm_per_px) return;
    const zoom = item.viewportToImageZoom(this.osd.viewport.getZoom(true));
    const nmPerScreenPx = this.details.nm_per_px / zoom;
    const length = roundDown(WIDEST_SCALE_BAR * nmPerScreenPx);
    this.bar.hidden = false;
    this.bar.style.width = `${length / nmPerScreenPx}px`;
    this.bar.textContent = lengthText(length);
  }

  zoom(factor) {
    this.osd?.viewport.zoomBy(factor);
    this.osd?.viewport.applyConstraints();
  }

  destroy() {
    this.osd?.destroy();
    this.element.remove();
  }
}

class ImageViewer {
  constructor(model, page) {
    this.model = model;
    this.page = page; // CSS selector of the explorer
    this.panes = [];
    this.leader = null; // the pane that the user moves; linked panes follow it
    this.loaded = new Map(); // patient, modality, place → promise of the image
    this.waiting = new Map(); // number of a request → what to do with the answer
    this.requests = 0;
    this.state = { all: false, linked: true, overlay: true, lesions: false };
    this.makeDialog();
    this.listen();
  }

  /* --- parts */

  makeDialog() {
    this.title = make("h2", { ariaLive: "polite" });
    this.opacity = make("input", { type: "range", min: 0, max: 1, step: 0.05, ariaLabel: "Opacity of the overlay" });
    this.opacity.addEventListener("input", () => this.refresh());
    this.buttons = {
      previous: this.button("↑", "Previous image (↑)", () => this.move(-1)),
      next: this.button("↓", "Next image (↓)", () => this.move(1)),
      out: this.button("−", "Zoom out (−)", () => this.zoom(1 / 1.5)),
      in: this.button("+", "Zoom in (+)", () => this.zoom(1.5)),
      whole: this.button("whole", "Whole image (0)", () => this.home()),
      all: this.button("all images", "All images of this modality side by side (a)", () => this.toggle("all")),
      linked: this.button("linked", "Zoom and move all images together (l)", () => this.toggle("linked")),
      overlay: this.button("overlay", "Overlay on or off (o)", () => this.toggle("overlay")),
      lesions: this.button("lesions", "Outlines of known lesions on or off (d)", () => this.toggle("lesions")),
      full: this.button("full screen", "Full screen (f)", () => this.fullScreen()),
      help: this.button("?", "Keys (?)", () => this.showHelp()),
      close: this.button("close", "Close (Esc)", () => this.dialog.close()),
    };
    const { overlay, ...others } = this.buttons;
    const tools = Object.values(others);
    tools.splice(7, 0, overlay, this.opacity);
    const keys = HELP.map(([key, text]) => make("tr", {}, make("th", { textContent: key }), make("td", { textContent: text })));
    this.help = make("div", { className: "help", hidden: true }, make("table", {}, ...keys));
    this.grid = make("div", { className: "grid" });
    const bar = make("header", {}, this.title, make("div", { className: "tools" }, ...tools));
    this.dialog = make("dialog", { className: "cmus-viewer" }, bar, this.grid, this.help);
    this.dialog.addEventListener("close", () => this.clear());
    document.body.append(this.dialog);
  }

  button(text, title, action) {
    const button = make("button", { type: "button", textContent: text, title, ariaLabel: title });
    button.addEventListener("click", action);
    return button;
  }

  listen() {
    this.onClick = (event) => this.clicked(event);
    this.onKey = (event) => this.pressed(event);
    this.onMessage = (content, buffers) => this.received(content, buffers);
    document.addEventListener("click", this.onClick);
    document.addEventListener("keydown", this.onKey, true);
    this.model.on("msg:custom", this.onMessage);
  }

  destroy() {
    document.removeEventListener("click", this.onClick);
    document.removeEventListener("keydown", this.onKey, true);
    this.model.off("msg:custom", this.onMessage);
    this.clear();
    this.dialog.remove();
    for (const promise of this.loaded.values()) this.release(promise);
  }

  /* --- the page */

  /* The images that the page shows now, in their order. */
  images() {
    const pictures = document.querySelectorAll(`${this.page} [data-patient] [data-place]`);
    return [...pictures].map((picture) => ({
      patient: picture.closest("[data-patient]").dataset.patient,
      modality: picture.dataset.modality,
      place: Number(picture.dataset.place),
      name: picture.querySelector("img").alt,
      heat: picture.querySelector(".heat")?.src,
    }));
  }

  same(patient, modality) {
    return this.images().filter((image) => image.patient === patient && image.modality === modality);
  }

  clicked(event) {
    const inPage = event.target.closest(`${this.page} [data-patient]`);
    if (!inPage) return;
    const tick = event.target.closest("button.tick");
    const picture = event.target.closest("[data-place]");
    const patient = inPage.dataset.patient;
    if (tick) {
      this.model.send({ do: "tick", patient, modality: tick.dataset.modality, place: Number(tick.dataset.of) });
    } else if (picture) {
      this.open(patient, picture.dataset.modality, Number(picture.dataset.place));
    }
  }

  pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const inDialog = this.dialog.open;
    const here = event.target === document.body || event.target.closest?.(`${this.page} .cmus-page`);
    const writes = event.target.closest?.("input, select, textarea, [contenteditable]");
    if (!inDialog && (!here || writes)) return;
    if (inDialog && writes && event.key.startsWith("Arrow")) return;
    const action = this.action(event.key, inDialog);
    if (!action) return;
    event.preventDefault();
    event.stopPropagation();
    action();
  }

  /* What a key does; without an open image only patients, images and help have keys. */
  action(key, inDialog) {
    const always = {
      ArrowLeft: () => this.step(-1),
      ArrowRight: () => this.step(1),
      "?": () => this.showHelp(),
    };
    const open = {
      ArrowUp: () => this.move(-1),
      ArrowDown: () => this.move(1),
      "+": () => this.zoom(1.5),
      "=": () => this.zoom(1.5),
      "-": () => this.zoom(1 / 1.5),
      0: () => this.home(),
      a: () => this.toggle("all"),
      l: () => this.toggle("linked"),
      o: () => this.toggle("overlay"),
      d: () => this.toggle("lesions"),
      f: () => this.fullScreen(),
    };
    if (/^[1-9]$/.test(key)) return () => this.openTEM(Number(key) - 1);
    return always[key] ?? (inDialog ? open[key] : undefined);
  }

  /* --- talking to Python */

  fetch(image) {
    const key = [image.patient, image.modality, image.place].join("\n");
    if (!this.loaded.has(key)) {
      const number = ++this.requests;
      const promise = new Promise((resolve, reject) => this.waiting.set(number, { resolve, reject }));
      this.loaded.set(key, promise);
      promise.catch(() => this.loaded.delete(key));
      const { patient, modality, place } = image;
      this.model.send({ do: "load", number, patient, modality, place });
    }
    this.forgetOldest();
    return this.loaded.get(key);
  }

  forgetOldest() {
    for (const [key, promise] of this.loaded) {
      if (this.loaded.size <= KEPT_IMAGES) return;
      this.loaded.delete(key);
      this.release(promise);
    }
  }

  release(promise) {
    promise.then((details) => URL.revokeObjectURL(details.url), () => {});
  }

  received(content, buffers) {
    if (content.show) {
      this.showPatient(content.show);
      return;
    }
    const { resolve, reject } = this.waiting.get(content.number) ?? {};
    if (!resolve) return; // another page of this explorer asked
    this.waiting.delete(content.number);
    if (content.error) {
      reject(new Error(content.error));
      return;
    }
    const url = URL.createObjectURL(new Blob([buffers[0]], { type: content.type }));
    resolve({ ...content, url });
  }

  /* --- what is open */

  open(patient, modality, place) {
    const image = this.same(patient, modality).find((one) => one.place === place);
    if (!image) return;
    this.current = { patient, modality, place };
    if (!this.dialog.open) {
      this.opacity.value = this.pageOpacity();
      this.dialog.showModal();
    }
    this.clear();
    const images = this.state.all ? this.same(patient, modality) : [image];
    this.panes = images.map((one) => new Pane(one, this));
    this.grid.style.setProperty("--columns", this.columns(images.length));
    this.grid.replaceChildren(...this.panes.map((pane) => pane.element));
    this.leader = this.panes[0];
    this.panes.forEach((pane) => pane.load());
    const shown = this.state.all ? `${modality}, ${images.length} images` : image.name;
    this.title.textContent = `${this.titleOf(patient)}: ${shown}`;
    this.refresh();
  }

  /* A case of a reader study has a title instead of its patient's name. */
  titleOf(patient) {
    const cases = [...document.querySelectorAll(`${this.page} [data-patient]`)];
    return cases.find((one) => one.dataset.patient === patient)?.dataset.title ?? patient;
  }

  pageOpacity() {
    const heat = document.querySelector(`${this.page} .heat`);
    return heat ? getComputedStyle(heat).opacity : 0.7;
  }

  columns(count) {
    const { innerWidth, innerHeight } = window;
    return Math.max(1, Math.min(count, Math.round(Math.sqrt((count * innerWidth) / innerHeight))));
  }

  openTEM(place) {
    const patient = this.dialog.open ? this.current.patient : this.images()[0]?.patient;
    if (patient !== undefined) this.open(patient, "TEM", place);
  }

  move(step) {
    const { patient, modality, place } = this.current;
    const images = this.images().filter((image) => image.patient === patient);
    const index = images.findIndex((image) => image.modality === modality && image.place === place) + step;
    const next = images[(index + images.length) % images.length];
    this.open(patient, next.modality, next.place);
  }

  step(direction) {
    this.model.send({ do: "step", direction });
  }

  /* The explorer shows another patient: so does the viewer. */
  showPatient(patient) {
    if (!this.dialog.open) return;
    const { modality, place } = this.current;
    const own = this.images().filter((image) => image.patient === patient);
    const alike = own.filter((image) => image.modality === modality);
    const image = alike.find((one) => one.place === place) ?? alike[0] ?? own[0];
    if (image) this.open(patient, image.modality, image.place);
    else this.dialog.close();
  }

  toggle(name) {
    this.state[name] = !this.state[name];
    if (name === "all") this.open(...Object.values(this.current));
    else this.refresh();
  }

  /* Buttons, opacity and overlays follow the state. */
  refresh() {
    for (const name of ["all", "linked", "overlay", "lesions"]) {
      this.buttons[name].ariaPressed = this.state[name];
    }
    const hasHeat = this.panes.some((pane) => pane.image.heat);
    const hasLesions = this.panes.some((pane) => pane.details?.lesions.length);
    this.buttons.linked.hidden = this.panes.length < 2;
    this.buttons.overlay.hidden = this.opacity.hidden = !hasHeat;
    this.buttons.lesions.hidden = !hasLesions;
    this.dialog.style.setProperty("--heat", this.state.overlay ? this.opacity.value : 0);
    this.dialog.classList.toggle("with-lesions", this.state.lesions);
  }

  zoom(factor) {
    const alone = this.panes.length > 1 && !this.state.linked;
    for (const pane of alone ? [this.leader] : this.panes) pane.zoom(factor);
  }

  home() {
    for (const pane of this.panes) pane.osd?.viewport.goHome();
  }

  follow(pane) {
    if (!this.state.linked || pane !== this.leader) return;
    const bounds = pane.osd.viewport.getBounds(true);
    for (const other of this.panes) {
      if (other !== pane) other.osd?.viewport.fitBounds(bounds, true);
    }
  }

  fullScreen() {
    if (document.fullscreenElement) document.exitFullscreen();
    else this.dialog.requestFullscreen();
  }

  showHelp() {
    if (!this.dialog.open) {
      this.title.textContent = "Keys";
      this.dialog.showModal();
      this.help.hidden = false;
      return;
    }
    this.help.hidden = !this.help.hidden;
  }

  clear() {
    this.panes.forEach((pane) => pane.destroy());
    this.panes = [];
    this.help.hidden = true;
  }
}

export default {
  render({ model }) {
    const viewer = new ImageViewer(model, `.${model.get("page")}`);
    return () => viewer.destroy();
  },
};
