// Puts the notebook's explorers, with a kernel behind them, where the deck has their pictures.
//
// The page talks to tools/present.py over one websocket: Jupyter's comm messages as JSON, with
// their binary buffers in base64. Each explorer is drawn by ipywidgets' own html-manager.

/** The server's end of the websocket: sends messages, hands what comes back to who waits for it. */
class Kernel {
  constructor(address) {
    this.comms = new Map(); // id -> Comm
    this.waiting = new Map(); // id of a message sent -> its callbacks, until the kernel is done
    this.socket = new WebSocket(address);
    this.opened = new Promise((resolve) => this.socket.addEventListener("open", resolve));
    this.socket.addEventListener("message", (event) => this.receive(JSON.parse(event.data)));
    this.socket.addEventListener("close", () => document.body.classList.add("live-gone"));
  }

  send(type, content, metadata = {}, callbacks = {}) {
    const id = crypto.randomUUID();
    this.waiting.set(id, callbacks);
    this.socket.send(JSON.stringify({ id, type, content, metadata }));
    return id;
  }

  receive(message) {
    const { content, parent_header: parent } = message;
    message.buffers = message.buffers.map(decode);
    if (message.msg_type === "status") {
      this.waiting.get(parent.msg_id)?.iopub?.status?.(message);
      if (content.execution_state === "idle") this.waiting.delete(parent.msg_id);
    } else {
      this.comms.get(content.comm_id)?.receive(message);
    }
  }
}

/** What ipywidgets' models call to reach their other half in the kernel. */
class Comm {
  constructor(kernel, target, id) {
    Object.assign(this, { kernel, target_name: target, comm_id: id, handlers: {} });
    kernel.comms.set(id, this);
  }

  open(data, metadata) {
    const content = { comm_id: this.comm_id, target_name: this.target_name, data };
    return this.kernel.send("comm_open", content, metadata);
  }

  send(data, callbacks, metadata) {
    return this.kernel.send("comm_msg", { comm_id: this.comm_id, data }, metadata, callbacks);
  }

  close(data = {}, callbacks, metadata) {
    this.kernel.comms.delete(this.comm_id);
    return this.kernel.send("comm_close", { comm_id: this.comm_id, data }, metadata, callbacks);
  }

  on_msg(handler) {
    this.handlers.comm_msg = handler;
  }

  on_close(handler) {
    this.handlers.comm_close = handler;
  }

  receive(message) {
    this.handlers[message.msg_type]?.(message);
  }
}

function decode(base64) {
  return new DataView(Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0)).buffer);
}

/** html-manager's widgets, with a kernel behind them. */
function liveManager(HTMLManager, kernel) {
  return new (class extends HTMLManager {
    async _create_comm(target, id, data, metadata) {
      const comm = new Comm(kernel, target, id);
      if (data || metadata) comm.open(data, metadata); // without, the kernel has opened it already
      return comm;
    }

    load() {
      return this._loadFromKernel();
    }
  })();
}

/** The keys and swipes made on an explorer are its own: none of them turns the slide. */
function keepEvents(mount) {
  mount.dataset.preventSwipe = ""; // reveal.js looks for it
  mount.addEventListener("keydown", (event) => {
    if (event.key === "Escape") document.activeElement.blur(); // the deck has the keys again
    event.stopPropagation();
  });
}

/**
 * Called when a readout is first seen, and when it grows. Its room only grows, lest the picture
 * jump; where it leaves the picture too little, it goes beside it.
 */
function divideRoom([{ target: room }]) {
  const panel = room.closest(".live");
  const picture = panel.querySelector(".widget-image");
  if (picture.clientHeight && picture.clientHeight < 0.8 * picture.naturalHeight) {
    panel.classList.add("beside");
  }
  if (room.offsetHeight) room.style.minHeight = `${room.offsetHeight}px`;
}

/** Gives the readout its room, and the picture its words: what ipywidgets makes a tooltip of. */
function watch(mount) {
  new ResizeObserver(divideRoom).observe(mount.querySelector(".widget-html-content"));
  const picture = mount.querySelector(".widget-image");
  const name = () => (picture.alt = picture.title);
  new MutationObserver(name).observe(picture, { attributeFilter: ["title"] });
  name();
}

async function goLive({ HTMLManager }) {
  // the widgets ask for MathJax 2, the deck has 3
  MathJax.Hub = { Queue: ([, , element]) => MathJax.typesetPromise([element]) };
  const kernel = new Kernel(`ws://${location.host}/kernel`);
  await kernel.opened;
  const manager = liveManager(HTMLManager, kernel);
  await manager.load();
  for (const mount of document.querySelectorAll(".live")) {
    keepEvents(mount);
    const view = await manager.create_view(await manager.get_model(mount.dataset.model));
    mount.replaceChildren();
    await manager.display_view(view, mount);
    await Promise.all(view.children_views.views); // a panel's parts come one by one
    watch(mount);
    mount.classList.add("live-on");
  }
  document.documentElement.classList.add("live-ready");
}

// require.js calls plain functions alone, not async ones
const whenReady = () => require(["@jupyter-widgets/html-manager"], (module) => void goLive(module));
document.addEventListener("ready", whenReady);
