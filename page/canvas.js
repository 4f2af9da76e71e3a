// A canvas for one picture and the paint above it. Its value, {picture, paint}, holds both as data: URLs or null, and is
// set at once when a stroke ends, so that whatever is clicked next finds it.
(() => {
  const BLANK = [512, 512];
  const FINEST = 1024; // pixels of the paint's longer side, and
  const COARSEST = 512; // where the picture is small
  const FILE_LIMIT = 32 * 2 ** 20; // bytes
  const KEPT = 30; // steps to undo
  const AS_THEY_ARE = ["image/png", "image/jpeg", "image/webp"];

  const icon = path => `<svg viewBox="0 0 24 24" aria-hidden="true"><path d="${path}"/></svg>`;
  const ICONS = {
    upload: icon("M12 16V5m0 0L7.5 9.5M12 5l4.5 4.5M5 16v3h14v-3"),
    camera: icon("M4 8h3.5L9 6h6l1.5 2H20v11H4zM12 10.2a3 3 0 1 0 .01 0"),
    pen: icon("M5 19l1-4L16 5l3 3L9 18zM14 7l3 3"),
    eraser: icon("M8.5 19L4 14.5 13.5 5 20 11.5 12.5 19zM8 10.5l6.5 6.5M12 19h8"),
    undo: icon("M9 6L5 10l4 4M5 10h9a5 5 0 0 1 0 10h-3"),
    clear: icon("M5 7h14M10 7V5h4v2M7 7l1 12h8l1-12M10.5 10.5v5.5M13.5 10.5v5.5"),
  };

  const busy = new Set(); // what a click has to wait for
  const drawing = new Set(); // canvases with a stroke that has not ended

  document.addEventListener(
    "click",
    event => {
      for (const canvas of drawing) canvas.endStroke();
      const button = event.target.closest("button");
      if (!busy.size || !button || button.closest(".canvas")) return;
      event.preventDefault();
      event.stopImmediatePropagation();
      Promise.allSettled([...busy]).then(() => button.click());
    },
    true,
  );

  const filled = value => ({ picture: value?.picture ?? null, paint: value?.paint ?? null });
  const same = (one, other) => one.picture === other.picture && one.paint === other.paint;

  const waitFor = work => {
    busy.add(work);
    const done = () => busy.delete(work);
    work.then(done, done);
    return work;
  };

  document.addEventListener("paste", event => {
    const file = [...(event.clipboardData?.files ?? [])].find(each => each.type.startsWith("image/"));
    const target = document.activeElement?.closest(".canvas") ?? document.querySelector(".canvas:hover");
    if (!file || !target?.mahlstick?.takesFiles) return;
    event.preventDefault();
    target.mahlstick.open(file);
  });

  async function decoded(url) {
    const image = new Image();
    image.src = url;
    await image.decode();
    return image;
  }

  function read(file) {
    return new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(reader.error);
      reader.readAsDataURL(file);
    });
  }

  /** A file as a data: URL that the server can read. */
  async function opened(file) {
    const url = await read(file);
    const image = await decoded(url);
    if (AS_THEY_ARE.includes(file.type)) return url;
    const copy = document.createElement("canvas");
    copy.width = image.naturalWidth || BLANK[0];
    copy.height = image.naturalHeight || BLANK[1];
    copy.getContext("2d").drawImage(image, 0, 0, copy.width, copy.height);
    return copy.toDataURL("image/png");
  }

  class Canvas {
    constructor(element, props, watch) {
      const root = element.querySelector(".canvas");
      const { words, colours, mask, files } = JSON.parse(root.dataset.settings);
      this.props = props;
      this.words = words[navigator.language.startsWith("zh") ? "zh" : "en"];
      this.colours = colours;
      this.takesFiles = files;
      this.isMask = mask;
      this.erasing = false;
      this.value = filled(null);
      this.past = [];
      this.stroke = null;
      this.latest = 0; // the last value that was asked to be shown
      this.build(root);
      watch("value", () => {
        const given = filled(this.props.value);
        if (same(given, this.value)) return;
        this.past = [];
        this.show(given);
      });
      this.show(filled(props.value));
    }

    build(root) {
      root.mahlstick = this;
      root.setAttribute("role", "group");
      root.setAttribute("aria-label", this.words.title);
      root.innerHTML =
        '<div class="canvas-head"><span class="canvas-title"></span><span class="canvas-sources"></span></div>' +
        '<div class="canvas-stage" tabindex="-1"><img alt="" hidden><canvas></canvas><p class="canvas-hint"></p></div>' +
        '<p class="canvas-fault" role="alert" hidden></p><div class="canvas-tools"></div>';
      const find = name => root.querySelector(name);
      this.root = root;
      [this.stage, this.image, this.layer] = [find(".canvas-stage"), find("img"), find("canvas")];
      [this.hint, this.fault] = [find(".canvas-hint"), find(".canvas-fault")];
      this.context = this.layer.getContext("2d", { willReadFrequently: true });
      find(".canvas-title").textContent = this.words.title;
      this.hint.textContent = this.words.hint;
      this.buildSources(find(".canvas-sources"));
      this.buildTools(find(".canvas-tools"));
      this.listen();
    }

    buildSources(place) {
      if (!this.takesFiles) return;
      this.file = this.input({});
      const upload = () => this.file.click();
      place.append(this.file, this.button("upload", upload), this.button("camera", () => this.openCamera()));
    }

    input(attributes) {
      const input = Object.assign(document.createElement("input"), { type: "file", accept: "image/*", hidden: true });
      for (const [name, value] of Object.entries(attributes)) input.setAttribute(name, value);
      input.setAttribute("aria-label", this.words.upload);
      input.addEventListener("change", () => {
        if (input.files[0]) this.open(input.files[0]);
        input.value = "";
      });
      return input;
    }

    buildTools(place) {
      this.pen = this.button("pen", () => this.choose(false));
      this.eraser = this.button("eraser", () => this.choose(true));
      this.undoButton = this.button("undo", () => this.undo());
      this.clearButton = this.button("clear", () => this.clear());
      this.size = Object.assign(document.createElement("input"), { type: "range", min: 1, max: 120, value: this.isMask ? 48 : 12 });
      this.size.setAttribute("aria-label", this.words.size);
      this.size.title = this.words.size;
      this.colour = this.colours[0];
      place.append(this.pen, this.eraser);
      if (this.colours.length > 1) place.append(...this.colours.map(colour => this.swatch(colour)));
      place.append(this.size, this.undoButton, this.clearButton);
      this.choose(false);
    }

    button(name, act) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "canvas-button";
      button.title = this.words[name];
      button.setAttribute("aria-label", this.words[name]);
      button.innerHTML = ICONS[name];
      button.addEventListener("click", act);
      return button;
    }

    swatch(colour) {
      const swatch = document.createElement("button");
      swatch.type = "button";
      swatch.className = "canvas-swatch";
      swatch.title = this.words[colour];
      swatch.setAttribute("aria-label", this.words[colour]);
      swatch.dataset.colour = colour;
      swatch.style.background = colour;
      swatch.addEventListener("click", () => {
        this.colour = colour;
        this.choose(false);
      });
      return swatch;
    }

    choose(erasing) {
      this.erasing = erasing;
      this.pen.setAttribute("aria-pressed", String(!erasing));
      this.eraser.setAttribute("aria-pressed", String(erasing));
      for (const swatch of this.root.querySelectorAll(".canvas-swatch")) {
        swatch.setAttribute("aria-pressed", String(!erasing && swatch.dataset.colour === this.colour));
      }
    }

    listen() {
      this.layer.addEventListener("pointerdown", event => this.beginStroke(event));
      this.layer.addEventListener("pointermove", event => this.goOn(event));
      for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) {
        this.layer.addEventListener(name, () => this.endStroke());
      }
      this.root.addEventListener("keydown", event => {
        if ((event.ctrlKey || event.metaKey) && event.key === "z") {
          event.preventDefault();
          this.undo();
        }
      });
      if (!this.takesFiles) return;
      this.root.addEventListener("dragover", event => {
        event.preventDefault();
        this.root.classList.add("dragged");
      });
      this.root.addEventListener("dragleave", () => this.root.classList.remove("dragged"));
      this.root.addEventListener("drop", event => {
        event.preventDefault();
        this.root.classList.remove("dragged");
        if (event.dataTransfer.files[0]) this.open(event.dataTransfer.files[0]);
      });
    }

    // Strokes.

    beginStroke(event) {
      if (event.button || this.stroke) return;
      if (this.needsPicture()) return this.file.click();
      event.preventDefault();
      this.layer.setPointerCapture(event.pointerId);
      this.stroke = { pointer: event.pointerId, at: this.place(event) };
      drawing.add(this);
      this.hint.hidden = true;
      this.line(this.stroke.at, this.stroke.at);
    }

    goOn(event) {
      if (event.pointerId !== this.stroke?.pointer) return;
      const seen = event.getCoalescedEvents?.() ?? [];
      for (const each of seen.length ? seen : [event]) {
        const at = this.place(each);
        this.line(this.stroke.at, at);
        this.stroke.at = at;
      }
    }

    endStroke() {
      if (!this.stroke) return;
      this.stroke = null;
      drawing.delete(this);
      this.remember();
      this.tell({ ...this.value, paint: this.layer.toDataURL("image/png") });
    }

    place(event) {
      const box = this.layer.getBoundingClientRect();
      const across = this.layer.width / box.width;
      const down = this.layer.height / box.height;
      return [(event.clientX - box.left) * across, (event.clientY - box.top) * down];
    }

    line([x, y], [toX, toY]) {
      const pen = this.context;
      pen.globalCompositeOperation = this.erasing ? "destination-out" : "source-over";
      pen.strokeStyle = this.colour;
      pen.lineWidth = (this.size.value * Math.max(this.layer.width, this.layer.height)) / BLANK[0];
      pen.lineCap = pen.lineJoin = "round";
      pen.beginPath();
      pen.moveTo(x, y);
      pen.lineTo(toX, toY);
      pen.stroke();
    }

    // Values.

    needsPicture() {
      return this.isMask && this.takesFiles && !this.value.picture;
    }

    remember() {
      this.past.push(this.value);
      this.past.splice(0, this.past.length - KEPT);
    }

    /** The person's hand has made a value; gradio has it when this returns. */
    tell(value) {
      this.props.value = value;
      this.keep(value);
    }

    keep(value) {
      this.value = value;
      this.fault.hidden = true;
      this.tidy();
    }

    /** Keeps a value, and paints it on the screen. */
    show(value) {
      this.keep(value);
      const mine = ++this.latest;
      return waitFor(this.paint(value, () => mine === this.latest)).catch(() => this.complain("unreadable"));
    }

    async paint(value, isLatest) {
      const picture = value.picture && (await decoded(value.picture));
      const paint = value.paint && (await decoded(value.paint));
      if (!isLatest()) return;
      const size = paint ? [paint.naturalWidth, paint.naturalHeight] : this.sizeFor(picture);
      [this.layer.width, this.layer.height] = size;
      if (paint) this.context.drawImage(paint, 0, 0);
      this.image.hidden = !picture;
      if (picture) this.image.src = value.picture;
      const [width, height] = picture ? [picture.naturalWidth, picture.naturalHeight] : size;
      this.stage.style.setProperty("--ratio", width / height);
    }

    sizeFor(picture) {
      if (!picture) return BLANK;
      const [width, height] = [picture.naturalWidth, picture.naturalHeight];
      const longer = Math.max(width, height);
      const factor = Math.min(Math.max(longer, COARSEST), FINEST) / longer;
      return [Math.max(1, Math.round(width * factor)), Math.max(1, Math.round(height * factor))];
    }

    tidy() {
      const isEmpty = !this.value.picture && !this.value.paint;
      this.hint.hidden = !isEmpty;
      this.root.classList.toggle("waiting", this.needsPicture());
      this.undoButton.disabled = !this.past.length;
      this.clearButton.disabled = isEmpty || (!this.value.paint && !this.takesFiles);
    }

    undo() {
      if (this.past.length) this.replace(this.past.pop());
    }

    /** The paint goes first, then the picture, unless that is the server's. */
    clear() {
      this.remember();
      this.replace({ picture: this.value.paint || !this.takesFiles ? this.value.picture : null, paint: null });
    }

    replace(value) {
      this.tell(value);
      this.show(value);
    }

    // Pictures from outside.

    open(file) {
      if (file.size > FILE_LIMIT) return this.complain("large");
      const mine = ++this.latest;
      const work = opened(file).then(url => mine === this.latest && this.receive(url));
      return waitFor(work).catch(() => this.complain("unreadable"));
    }

    receive(picture) {
      this.remember();
      this.replace({ picture, paint: null });
    }

    complain(name) {
      this.fault.textContent = this.words[name];
      this.fault.hidden = false;
    }

    async openCamera() {
      let stream;
      try {
        stream = await navigator.mediaDevices.getUserMedia({ video: true });
      } catch {
        // Where pages may not use a camera a telephone still offers its own.
        return this.input({ capture: "environment" }).click();
      }
      this.look(stream);
    }

    look(stream) {
      const view = document.createElement("div");
      view.className = "canvas-camera";
      view.innerHTML = "<video autoplay playsinline muted></video><div><button></button><button></button></div>";
      const video = view.querySelector("video");
      const [shoot, stop] = view.querySelectorAll("button");
      video.srcObject = stream;
      shoot.textContent = this.words.shoot;
      stop.textContent = this.words.stop;
      const close = () => {
        stream.getTracks().forEach(track => track.stop());
        view.remove();
      };
      stop.addEventListener("click", close);
      shoot.addEventListener("click", () => {
        const still = document.createElement("canvas");
        [still.width, still.height] = [video.videoWidth, video.videoHeight];
        still.getContext("2d").drawImage(video, 0, 0);
        close();
        this.receive(still.toDataURL("image/png"));
      });
      this.stage.append(view);
      shoot.focus();
    }
  }

  window.mahlstickCanvas = (element, props, watch) => new Canvas(element, props, watch);
})();
