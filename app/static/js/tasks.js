// @ts-check
/** Only the newest task counts: starting one aborts the one before, whose answer is then dropped. */

export class Latest {
  /** @type {AbortController | null} */
  #current = null;

  /**
   * @template T
   * @param {(signal: AbortSignal, commit: (write: () => void) => void) => Promise<T>} task `commit` runs its
   *   argument only while the task is still the newest, so that a stale answer can't overwrite a newer one
   * @returns {Promise<"done" | "superseded">} errors of a superseded task are dropped, others are thrown
   */
  async run(task) {
    this.#current?.abort();
    const mine = new AbortController();
    this.#current = mine;
    try {
      await task(mine.signal, (write) => {
        if (!mine.signal.aborted) write();
      });
      return mine.signal.aborted ? "superseded" : "done";
    } catch (error) {
      if (mine.signal.aborted) return "superseded";
      throw error;
    } finally {
      if (this.#current === mine) this.#current = null;
    }
  }

  /** @returns {boolean} whether there was something to cancel */
  cancel() {
    const running = this.#current !== null;
    this.#current?.abort();
    this.#current = null;
    return running;
  }
}
