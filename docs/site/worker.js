/* From a disk (file://) browsers start no worker. The search then runs in a
 * frame: the same messages, to and fro. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super()
      this.waiting = []
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.srcdoc = "<!doctype html>"
      frame.onload = () => this.begin(frame, address)
      document.body.append(frame)
    }

    begin(frame, address) {
      const inside = frame.contentWindow
      // What the worker posts, the page hears.
      inside.postMessage = data => {
        const event = new MessageEvent("message", { data })
        this.dispatchEvent(event)
        this.onmessage?.(event)
      }
      const script = inside.document.createElement("script")
      script.src = address
      script.onload = () => {
        this.inside = inside
        this.waiting.forEach(data => this.postMessage(data))
      }
      inside.document.body.append(script)
    }

    postMessage(data) {
      if (!this.inside) return this.waiting.push(data)
      this.inside.dispatchEvent(new MessageEvent("message", { data }))
    }

    terminate() {}
  }
}
