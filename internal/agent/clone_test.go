package agent_test

import (
	"context"
	"os"
	"testing"
	"time"

	"google.golang.org/grpc/test/bufconn"

	"github.com/renewd/renewd/internal/agent"
)

// A node is cloned with its identity. Both copies renew and report as one agent: the
// server notices, and reports nothing as safe that either could hold.
func TestClonedNode(t *testing.T) {
	inWorld(t, 3, nil, func(w *world) {
		w.waitHeld(3)
		dir, err := os.MkdirTemp("", "renewd-clone")
		w.check(err)
		defer os.RemoveAll(dir)
		w.check(os.CopyFS(dir, os.DirFS(w.cfg.DataDir)))
		cfg := w.cfg
		cfg.DataDir, cfg.Listener = dir, bufconn.Listen(1<<20)
		clone, err := agent.New(cfg)
		w.check(err)
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- clone.Run(ctx) }()
		defer func() { cancel(); w.check(<-done) }()

		old, _ := w.rotate()
		for range 40 {
			time.Sleep(30 * time.Second)
			if w.ledger.X509(old.X509AuthorityID, true).Clear {
				w.t.Fatal("safe, while two nodes have one identity and one may hold what the other has replaced")
			}
		}
		if two := w.ledger.Duplicated(); len(two) != 1 {
			w.t.Errorf("duplicated are %v, want the one agent", two)
		}
		if holders := w.ledger.Holders(old.X509AuthorityID); len(holders) != 1 || holders[0].Reason != "duplicated" || holders[0].Latest.Before(time.Now()) {
			w.t.Errorf("holders %+v", holders)
		}
	})
}

// Restarts do not count as a clone, even many. They delay safe to remove by a few minutes.
func TestRestartIsNoClone(t *testing.T) {
	inWorld(t, 3, nil, func(w *world) {
		for range 3 {
			w.waitHeld(3)
			w.stopAgent()
			w.startAgent()
		}
		w.waitHeld(3)
		old, _ := w.rotate()
		w.until("safe", 6*time.Minute, func() bool { return w.ledger.X509(old.X509AuthorityID, true).Clear })
		if two := w.ledger.Duplicated(); len(two) > 0 {
			w.t.Errorf("duplicated are %v", two)
		}
	})
}

// A process of the agent has one random ID in its reports and metrics. The next process
// has another one.
func TestProcessID(t *testing.T) {
	inWorld(t, 1, nil, func(w *world) {
		seen := map[string]bool{}
		for range 2 {
			w.waitHeld(1)
			time.Sleep(2 * time.Minute)
			w.mu.Lock()
			id := w.process
			w.mu.Unlock()
			if host, err := os.Hostname(); err != nil || w.host != host {
				w.t.Errorf("the node reports as %q, it is %q, %v", w.host, host, err)
			}
			if len(id) < 16 || seen[id] || w.gauge("renewd_agent_info", w.host, id, w.agent.State().OwnID) != 1 {
				w.t.Errorf("the process reports as %q, before %v", id, seen)
			}
			seen[id] = true
			w.stopAgent()
			w.startAgent()
		}
	})
}
