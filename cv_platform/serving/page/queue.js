// Sends a few images at a time, and waits as long as a busy service asks.

const MOST_AT_ONCE = 3;
const PATIENCE_MS = 300000;
const USUAL_WAIT_S = 2;

export class Queue {
  #waiting = [];
  #running = 0;
  #atOnce = MOST_AT_ONCE;
  #until = 0;
  #timer = null;
  #work;
  #settled;
  #postponed;
  #paused;

  /**
   * `work(item)` does one; `settled(item, error)` hears how it ended, error being null when it went well;
   * `postponed(item)` hears that it waits again; `paused(seconds)` hears each second how long the service still asks
   * to wait, 0 when it goes on.
   */
  constructor({ work, settled, postponed, paused }) {
    this.#work = work;
    this.#settled = settled;
    this.#postponed = postponed;
    this.#paused = paused;
  }

  add(items) {
    this.#waiting.push(...items);
    this.#next();
  }

  /** Takes out what has not begun, and returns it. */
  drain() {
    return this.#waiting.splice(0);
  }

  #next() {
    if (this.#timer !== null) return;
    const left = Math.ceil((this.#until - Date.now()) / 1000);
    if (left > 0 && this.#waiting.length) {
      this.#paused(left);
      this.#timer = setTimeout(() => { this.#timer = null; this.#next(); }, Math.min(1000, this.#until - Date.now()));
      return;
    }
    this.#paused(0);
    while (this.#running < this.#atOnce && this.#waiting.length) this.#run(this.#waiting.shift());
  }

  async #run(item) {
    this.#running += 1;
    try {
      await this.#work(item);
      this.#atOnce = Math.min(MOST_AT_ONCE, this.#atOnce + 1);
      item.busySince = null;
      this.#settled(item, null);
    } catch (error) {
      if (error.status === 429 && Date.now() - (item.busySince ??= Date.now()) < PATIENCE_MS) {
        // One at a time until the service keeps up again.
        this.#atOnce = 1;
        this.#until = Math.max(this.#until, Date.now() + 1000 * (error.retryAfter ?? USUAL_WAIT_S));
        this.#waiting.unshift(item);
        this.#postponed(item);
      } else {
        item.busySince = null;
        this.#settled(item, error);
      }
    } finally {
      this.#running -= 1;
      this.#next();
    }
  }
}
