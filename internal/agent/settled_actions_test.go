package agent_test

import (
	"fmt"
	"os"
	"slices"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/node"
	"github.com/renewd/renewd/internal/server/keyset"
)

// replaced returns the keysets that are neither active nor tainted.
func (h *settledHistory) replaced() []keyset.Keyset {
	active := h.w.server.Keysets().Active()
	return slices.DeleteFunc(slices.Clone(h.keysets), func(k keyset.Keyset) bool {
		return k.ID == active.ID || slices.ContainsFunc(h.tainted, func(t keyset.Keyset) bool { return t.ID == k.ID })
	})
}

// activate activates a new keyset and returns the one before.
func (h *settledHistory) activate() keyset.Keyset {
	w := h.w
	// An operator waits until the agents have the new bundle: without it they trust no
	// server that uses the new keyset.
	w.set(func(f *faults) { f.down = false })
	old := w.server.Keysets().Active()
	next, err := w.server.Keysets().Prepare(w.t.Context())
	w.check(err)
	w.until("new bundle", time.Minute, func() bool {
		b := w.agent.Bundle()
		if b == nil {
			return false
		}
		_, ok := b.Own.X509Authority(next.X509AuthorityID)
		return ok && w.agent.Unsaved()["bundle.json"] == nil
	})
	h.check()
	w.check(w.server.Keysets().Activate(w.t.Context(), next.ID))
	h.keysets = append(h.keysets, next)
	return old
}

func (h *settledHistory) taint(k keyset.Keyset) {
	h.w.check(h.w.server.Keysets().Taint(h.w.t.Context(), k.ID))
	h.tainted = append(h.tainted, k)
}

// rotate activates a new keyset and taints one that was replaced.
func (h *settledHistory) rotate() {
	old := h.replaced()
	if len(old) == 0 || h.r.IntN(3) == 0 {
		old = append(old, h.activate())
		h.pass(time.Duration(h.r.IntN(30)) * time.Second)
	}
	h.taint(old[h.r.IntN(len(old))])
}

// signLate makes a lagging server sign a new SVID slowly, with an authority that is
// tainted meanwhile.
func (h *settledHistory) signLate() {
	w := h.w
	k := h.activate()
	h.entries++
	w.setEntries(append(entriesFor(len(entryLifetimes)), entryFor(h.entries)))
	name := fmt.Sprint(h.entries)
	w.until("new entry", time.Minute, func() bool {
		return w.agent.Cache().Match([]cache.Selector{{Type: "test", Value: name}}).Matched > 0
	})
	lag := w.record(k.ID)
	w.set(func(f *faults) { f.lag, f.signing = lag, 29*time.Second })
	p := &workloadModel{process: w.begin(name)}
	p.clients = append(p.clients, &clientModel{stream: p.open()})
	h.workloads = append(h.workloads, p)
	time.Sleep(time.Second)
	w.set(func(f *faults) { f.lag, f.signing = nil, 0 })
	h.taint(k)
	h.pass(40 * time.Second)
	p.kill()
	h.workloads = slices.DeleteFunc(h.workloads, func(o *workloadModel) bool { return o == p })
	w.setEntries(entriesFor(len(entryLifetimes)))
}

// reattest makes the server forget the agent. The authority that signs the new agent SVID,
// and all before, are tainted while it is in flight. Half of the times the disk is full.
func (h *settledHistory) reattest() {
	w := h.w
	h.activate()
	h.newToken()
	before := w.agent.State().OwnID
	w.check(w.server.EvictAgent(w.t.Context(), spiffeid.RequireFromString(before), true))
	w.set(func(f *faults) { f.answer = 50 * time.Second })
	w.until("agent attests", time.Minute, func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.attestations > 0
	})
	w.set(func(f *faults) { f.answer = 0 })
	h.activate()
	if h.r.IntN(2) == 0 {
		w.fillDisk()
	}
	for _, k := range h.replaced() {
		h.taint(k)
	}
	h.pass(80 * time.Second)
	w.freeDisk()
	w.until("agent attested", time.Minute, func() bool {
		return w.agent.State().OwnID != before && w.agent.Unsaved()[node.Files[0]] == nil
	})
}

// newToken provides a new join token.
func (h *settledHistory) newToken() {
	token, err := h.w.server.CreateJoinToken(h.w.t.Context(), time.Hour, "")
	h.w.check(err)
	h.w.check(os.WriteFile(h.token, []byte(token.Value), 0o600))
}

// hideRuntimeDir hides runtime_dir during a rotation.
func (h *settledHistory) hideRuntimeDir() {
	if h.noRuntimeDir {
		return
	}
	h.w.hideRuntimeDir()
	h.rotate()
	h.pass(40 * time.Second)
	h.w.showRuntimeDir()
	h.pass(11 * time.Second) // until failed writes are repeated
}

// restart restarts the agent, or kills it and starts it with its files from before. Half
// of the times an authority is tainted meanwhile.
func (h *settledHistory) restart() {
	w := h.w
	away := h.r.IntN(2) == 0
	if away && len(h.replaced()) == 0 {
		h.activate()
	}
	kill := h.r.IntN(2) == 0
	if kill && h.r.IntN(2) == 0 {
		// An SVID that a workload has got just now must be known afterwards.
		p := h.begin()
		synctest.Wait()
		if !h.noRuntimeDir && h.r.IntN(2) == 0 {
			p.stop()
		}
	}
	synctest.Wait()
	var dirs []string
	if kill {
		dirs = append(dirs, w.cfg.DataDir)
		if !h.noRuntimeDir {
			dirs = append(dirs, w.cfg.RuntimeDir)
		}
	}
	for _, dir := range dirs {
		w.check(os.CopyFS(dir+".then", os.DirFS(dir)))
	}
	w.stopAgent()
	for _, dir := range dirs {
		w.check(os.RemoveAll(dir))
		w.check(os.Rename(dir+".then", dir))
		w.check(os.Chmod(dir, 0o700))
	}
	if h.r.IntN(2) == 0 {
		time.Sleep(time.Duration(h.r.IntN(120)) * time.Second)
	}
	if away {
		old := h.replaced()
		h.taint(old[h.r.IntN(len(old))])
	}
	if h.r.IntN(2) == 0 {
		// Workloads that reconnect are attested slowly.
		w.attesting.Store(int64(60+h.r.IntN(90)) * int64(time.Second))
	}
	w.startAgent()
	for _, p := range h.workloads {
		for _, c := range p.clients {
			if c.back.IsZero() {
				c.disconnect(h)
			}
		}
	}
}
