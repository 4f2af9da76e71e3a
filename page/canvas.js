// A canvas for one picture and the paint above it. Its value, {picture, paint}, holds both as data: URLs or null, and is
// set at once when a stroke ends, so that whatever is clicked next finds it. And a strip of pictures side by side, whose
// value is the list of their data: URLs, or null.
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
    remove: icon("M7 7l10 10M17 7L7 17"),
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
    const files = [...(event.clipboardData?.files ?? [])].filter(each => each.type.startsWith("image/"));
    const target = document.activeElement?.closest(".canvas") ?? document.querySelector(".canvas:hover");
    if (!files.length || !target?.mahlstick?.takesFiles) return;
    event.preventDefault();
    target.mahlstick.take(files);
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

  /** What takes pictures from files, the clipboard and the camera, and says what is wrong with them. */
  class Taker {
    constructor(element, props, watch) {
      this.root = element.querySelector(".canvas");
      this.root.mahlstick = this;
      this.props = props;
      const { words, files, ...settings } = JSON.parse(this.root.dataset.settings);
      this.settings = settings;
      this.words = words[navigator.language.startsWith("zh") ? "zh" : "en"];
      this.takesFiles = files;
      this.latest = 0; // the last value that was asked to be shown
      this.lay();
      watch("value", () => this.given(this.props.value));
      this.given(props.value);
    }

    /** The title with its buttons, ``inside``, and a line for faults. */
    frame(inside) {
      this.root.setAttribute("role", "group");
      this.root.setAttribute("aria-label", this.words.title);
      this.root.innerHTML =
        '<div class="canvas-head"><span class="canvas-title"></span><span class="canvas-sources"></span></div>' +
        inside.replace("FAULT", '<p class="canvas-fault" role="alert" hidden></p>');
      this.fault = this.find(".canvas-fault");
      this.find(".canvas-title").textContent = this.words.title;
      if (this.takesFiles) this.laySources(this.find(".canvas-sources"));
    }

    find(name) {
      return this.root.querySelector(name);
    }

    laySources(place) {
      this.file = this.input(this.settings.several ? { multiple: "" } : {});
      const upload = () => this.file.click();
      place.append(this.file, this.button("upload", upload), this.button("camera", () => this.openCamera()));
      this.root.addEventListener("dragover", event => {
        event.preventDefault();
        this.root.classList.add("dragged");
      });
      this.root.addEventListener("dragleave", () => this.root.classList.remove("dragged"));
      this.root.addEventListener("drop", event => {
        event.preventDefault();
        this.root.classList.remove("dragged");
        this.take([...event.dataTransfer.files]);
      });
    }

    input(attributes) {
      const input = Object.assign(document.createElement("input"), { type: "file", accept: "image/*", hidden: true });
      for (const [name, value] of Object.entries(attributes)) input.setAttribute(name, value);
      input.setAttribute("aria-label", this.words.upload);
      input.addEventListener("change", () => {
        this.take([...input.files]);
        input.value = "";
      });
      return input;
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

    /** Reads files; where there is place for one only, the last that was given counts. */
    take(files) {
      const some = this.settings.several ? files : files.slice(0, 1);
      if (!some.length) return;
      if (some.some(file => file.size > FILE_LIMIT)) return this.complain("large");
      const mine = this.settings.several ? this.latest : ++this.latest;
      const work = Promise.all(some.map(opened)).then(pictures => mine === this.latest && this.receive(pictures));
      return waitFor(work).catch(() => this.complain("unreadable"));
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
        this.receive([still.toDataURL("image/png")]);
      });
      shoot.disabled = true; // until there is a picture to take
      video.addEventListener("loadeddata", () => {
        shoot.disabled = false;
        shoot.focus();
      });
      this.screen.append(view);
      stop.focus();
    }
  }

  class Canvas extends Taker {
    lay() {
      this.erasing = false;
      this.value = filled(null);
      this.past = [];
      this.stroke = null;
      this.frame(
        '<div class="canvas-stage" tabindex="-1"><img alt="" hidden><canvas></canvas><p class="canvas-hint"></p></div>' +
          'FAULT<div class="canvas-tools"></div>',
      );
      this.screen = this.stage = this.find(".canvas-stage");
      [this.image, this.layer] = [this.find("img"), this.find("canvas")];
      this.hint = this.find(".canvas-hint");
      this.hint.textContent = this.words.hint;
      this.context = this.layer.getContext("2d", { willReadFrequently: true });
      this.layTools(this.find(".canvas-tools"));
      this.listen();
    }

    /** A value from the server, or the one that the hand has just made. */
    given(value) {
      const found = filled(value);
      if (this.latest && same(found, this.value)) return;
      this.past = [];
      this.show(found);
    }

    layTools(place) {
      this.pen = this.button("pen", () => this.choose(false));
      this.eraser = this.button("eraser", () => this.choose(true));
      this.undoButton = this.button("undo", () => this.undo());
      this.clearButton = this.button("clear", () => this.clear());
      this.size = Object.assign(document.createElement("input"), { type: "range", min: 1, max: 120, value: this.settings.mask ? 48 : 12 });
      this.size.setAttribute("aria-label", this.words.size);
      this.size.title = this.words.size;
      const { colours } = this.settings;
      this.colour = colours[0];
      place.append(this.pen, this.eraser);
      if (colours.length > 1) place.append(...colours.map(colour => this.swatch(colour)));
      place.append(this.size, this.undoButton, this.clearButton);
      this.choose(false);
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
      return this.settings.mask && this.takesFiles && !this.value.picture;
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

    receive([picture]) {
      this.remember();
      this.replace({ picture, paint: null });
    }
  }

  class Strip extends Taker {
    lay() {
      this.frame('<ul class="strip-pictures"></ul><button type="button" class="strip-empty"></button>FAULT');
      this.screen = this.root;
      [this.list, this.empty] = [this.find(".strip-pictures"), this.find(".strip-empty")];
      this.empty.textContent = this.words.hint;
      this.empty.addEventListener("click", () => this.file.click());
    }

    given(value) {
      const pictures = value ?? [];
      if (this.value && pictures.join() === this.value.join()) return;
      this.latest++; // what is being read comes too late
      this.show(pictures);
    }

    receive(pictures) {
      this.tell(this.settings.several ? [...this.value, ...pictures] : pictures);
    }

    /** The person's hand has made a value; gradio has it when this returns. */
    tell(pictures) {
      this.props.value = pictures.length ? pictures : null;
      this.show(pictures);
    }

    show(pictures) {
      this.value = pictures;
      this.fault.hidden = true;
      this.empty.hidden = pictures.length > 0;
      this.list.hidden = !pictures.length;
      this.list.replaceChildren(...pictures.map((picture, i) => this.entry(picture, i)));
    }

    entry(picture, place) {
      const entry = document.createElement("li");
      const image = Object.assign(document.createElement("img"), { src: picture, alt: `${this.words.title} ${place + 1}` });
      const others = () => this.tell(this.value.filter((_, i) => i !== place));
      entry.append(image, this.button("remove", others));
      return entry;
    }
  }

  window.mahlstickCanvas = (...given) => new Canvas(...given);
  window.mahlstickStrip = (...given) => new Strip(...given);
})();
