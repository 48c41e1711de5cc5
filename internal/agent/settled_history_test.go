package agent_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/metrics"
)

// When the agent reports a tainted authority as settled, no running workload has a valid
// SVID of it from this agent. Neither has the agent itself, in memory or in a file that a
// restart would load, and none is in flight that was requested before the taint was seen.
// The test reads the SVIDs of the clients, in random histories of restarts and kills of the
// agent; workloads that are stopped, killed, do not read, reconnect late, are attested
// slowly or call once; evictions, outages, expiring SVIDs, a server that lags, attestations
// of the agent, a full disk, a hidden runtime_dir, and taints. Settled is reached minutes
// after all faults have ended or, for workloads that do not resume, when their SVIDs have
// expired.
//
// An agent without runtime_dir knows only workloads that reconnect in time, and its
// histories have no others.
//
// RENEWD_SEED replays one history; RENEWD_HISTORIES sets how many there are.
func TestSettledAgreesWithTheWorkloads(t *testing.T) {
	histories, base := 24, rand.Uint64()
	if n, err := strconv.Atoi(os.Getenv("RENEWD_HISTORIES")); err == nil {
		histories = n
	}
	if seed, err := strconv.ParseUint(os.Getenv("RENEWD_SEED"), 10, 64); err == nil {
		base, histories = seed, 1
	}
	var reported atomic.Int64
	t.Run("histories", func(t *testing.T) {
		for i := range histories {
			seed := base + uint64(i)
			t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
				tokens := t.TempDir()
				h := &settledHistory{r: rand.New(rand.NewPCG(seed, 0)), certs: make(map[string]certificate)}
				inWorldWithRuntimeDir(t, 0, func(w *world) {
					w.cfg.TaintDelay, w.cfg.CacheSize, w.unchecked = 2*time.Second, 2, true
					w.cfg.EntryRemovalDelay = time.Second
					// Polls take most of the time of a history.
					w.cfg.RefreshInterval = 20 * time.Second
					if h.noRuntimeDir = h.r.IntN(4) == 0; h.noRuntimeDir {
						w.cfg.RuntimeDir = ""
					}
					// The agent attests more than once.
					h.token = filepath.Join(tokens, "token")
					w.check(os.WriteFile(h.token, []byte(w.cfg.JoinToken), 0o600))
					w.cfg.JoinToken, w.cfg.JoinTokenFile = "", h.token
				}, func(w *world) {
					h.w = w
					h.play()
					reported.Add(int64(h.settledCount))
				})
			})
		}
	})
	// The histories must reach the state under test.
	if histories >= 24 && reported.Load() == 0 {
		t.Error("settled was never reported")
	}
}

// settledHistory is a history of workloads and the SVIDs that they read.
type settledHistory struct {
	w            *world
	r            *rand.Rand
	keysets      []keyset.Keyset
	tainted      []keyset.Keyset
	workloads    []*workloadModel
	noRuntimeDir bool                   // no runtime_dir
	token        string                 // path of the join token
	entries      int                    // number of entries
	certs        map[string]certificate // by what they were read from
	settledCount int
	past         []string
}

// workloadModel is a process with clients that keep a stream open, or one that calls from
// time to time. Each uses the SVIDs that it read last.
type workloadModel struct {
	*process
	clients []*clientModel
	asks    bool
	asked   *update
}

type clientModel struct {
	stream *stream
	has    *update   // the last update of the stream before
	back   time.Time // when it opens the next stream; zero while it has one
	read   func()    // makes the process read the connection again; nil while it does
}

// entryLifetimes are the lifetimes of the SVIDs of each entry.
var entryLifetimes = []time.Duration{5 * time.Minute, 10 * time.Minute, 40 * time.Minute}

func (h *settledHistory) play() {
	w := h.w
	w.set(h.clear)
	h.entries = len(entryLifetimes)
	w.setEntries(entriesFor(h.entries))
	h.keysets = []keyset.Keyset{w.server.Keysets().Active()}
	time.Sleep(30 * time.Second)
	for range 3 {
		h.begin()
	}
	defer func() {
		for _, p := range h.workloads {
			p.kill()
		}
	}()
	h.pass(5 * time.Second)
	for range 10 {
		op := h.r.IntN(24)
		p := h.workloads[h.r.IntN(len(h.workloads))]
		h.past = append(h.past, fmt.Sprintf("%d/%d", op, p.name.PID))
		switch op {
		case 0, 1, 14, 15:
			h.rotate()
		case 2, 3:
			h.restart()
		case 4, 16:
			if !h.noRuntimeDir {
				p.stop()
			}
		case 5:
			h.resume(p)
		case 6:
			p.kill()
			h.workloads = slices.DeleteFunc(h.workloads, func(o *workloadModel) bool { return o == p })
			h.begin()
		case 7:
			if !p.asks && !p.stopped() && len(p.clients) < 3 {
				p.clients = append(p.clients, &clientModel{stream: p.open()})
			}
		case 8:
			for _, c := range p.clients {
				// An agent without runtime_dir knows a client from before a restart
				// only if the client has called.
				_, answered := c.stream.last()
				if !p.stopped() && c.back.IsZero() && (answered || !h.noRuntimeDir) && h.r.IntN(2) == 0 {
					c.disconnect(h)
				}
			}
		case 9, 17:
			if h.noRuntimeDir {
				h.restart()
			} else if len(p.clients) > 0 && !p.stopped() {
				if c := p.clients[0]; c.read == nil && c.back.IsZero() {
					c.read = c.stream.conn.stall()
				}
			}
		case 10:
			down := h.r.IntN(2) == 0
			w.set(func(f *faults) { f.down = down })
		case 11:
			var lag *keyset.Record
			if h.r.IntN(2) == 0 {
				lag = w.record(h.keysets[h.r.IntN(len(h.keysets))].ID)
			}
			w.set(func(f *faults) { f.lag = lag })
		case 12:
			w.set(func(f *faults) { f.signing = time.Duration(h.r.IntN(20)) * time.Second })
		case 13:
			h.pass(time.Duration(h.r.IntN(900)) * time.Second)
		case 18:
			w.attesting.Store(int64(h.r.IntN(60)) * int64(time.Second))
		case 19, 20:
			h.signLate()
		case 21, 22:
			h.reattest()
		case 23:
			h.hideRuntimeDir()
		}
		h.pass(time.Duration(h.r.IntN(60)) * time.Second)
	}
	h.end()
}

// begin starts a workload with one or two clients, or one that calls.
func (h *settledHistory) begin() *workloadModel {
	p := &workloadModel{process: h.w.begin(fmt.Sprint(h.r.IntN(len(entryLifetimes))), fmt.Sprint(h.r.IntN(len(entryLifetimes))))}
	if p.asks = !h.noRuntimeDir && h.r.IntN(3) == 0; !p.asks {
		for range 1 + h.r.IntN(2) {
			p.clients = append(p.clients, &clientModel{stream: p.open()})
		}
	}
	h.workloads = append(h.workloads, p)
	return p
}

// disconnect breaks the client's connection. It reconnects as go-spiffe does: after up to 144 s,
// unless its process is stopped.
func (c *clientModel) disconnect(h *settledHistory) {
	if c.read != nil {
		c.read = nil // data that was not read is lost with the connection
	}
	c.stream.conn.cut()
	c.back = time.Now().Add(time.Duration(h.r.IntN(144)) * time.Second)
	if last, ok := c.stream.last(); ok {
		c.has = &last
	}
}

// returning reports whether a client of the process will reconnect.
func (p *workloadModel) returning() bool {
	return !p.stopped() && slices.ContainsFunc(p.clients, func(c *clientModel) bool { return !c.back.IsZero() })
}

func (h *settledHistory) resume(p *workloadModel) {
	if !p.stopped() {
		return
	}
	p.resume()
	for _, c := range p.clients {
		if !c.back.IsZero() {
			c.back = time.Now().Add(time.Duration(h.r.IntN(144)) * time.Second)
		}
	}
}

// pass waits, runs the workloads and checks.
func (h *settledHistory) pass(d time.Duration) {
	step := max(8*time.Second, d/20)
	for end := time.Now().Add(d); ; {
		h.check()
		if !time.Now().Before(end) {
			return
		}
		time.Sleep(100*time.Millisecond + time.Duration(h.r.Int64N(int64(step))))
		synctest.Wait()
		for _, p := range h.workloads {
			if p.stopped() {
				continue
			}
			for _, c := range p.clients {
				select {
				case <-c.stream.done:
					if c.back.IsZero() {
						c.disconnect(h)
					}
				default:
				}
				if !c.back.IsZero() && !time.Now().Before(c.back) {
					c.stream, c.back = p.open(), time.Time{}
				}
			}
			if p.asks && h.r.IntN(4) == 0 {
				if u, err := p.ask(); err == nil {
					p.asked = &u
				}
			}
		}
	}
}

// clear ends all faults. The lifetimes of SVIDs are shorter than a server's minimum.
func (h *settledHistory) clear(f *faults) {
	*f = faults{life: func(entry string) time.Duration {
		for i, life := range entryLifetimes {
			if entry == entryID(i) {
				return life
			}
		}
		return entryLifetimes[0]
	}}
}

// end ends all faults and, in most histories, resumes the workloads. Settled follows when
// the last client has reconnected, the wave is over, and the time for other clients of a
// process has passed. A workload that is not resumed counts until its SVIDs expire.
func (h *settledHistory) end() {
	w := h.w
	w.set(h.clear)
	w.attesting.Store(0)
	within := 8 * time.Minute
	if h.r.IntN(4) == 0 {
		within += entryLifetimes[len(entryLifetimes)-1]
	} else {
		for _, p := range h.workloads {
			h.resume(p)
			for _, c := range p.clients {
				if c.read != nil {
					c.read()
					c.read = nil
				}
			}
		}
	}
	for from := time.Now(); time.Since(from) < within; {
		h.pass(30 * time.Second)
		if len(h.unsettled()) == 0 && !slices.ContainsFunc(h.workloads, (*workloadModel).returning) {
			return
		}
	}
	for _, k := range h.unsettled() {
		w.t.Errorf("after %v and %v without faults: not settled: %+v; ready: %v", h.past, within, w.authority(k), w.agent.Ready())
	}
}

func (h *settledHistory) unsettled() []keyset.Keyset {
	state := h.w.agent.State()
	return slices.DeleteFunc(slices.Clone(h.tainted), func(k keyset.Keyset) bool {
		a, _ := authorityOf(state, metrics.TypeX509, k.X509AuthorityID)
		return settled(a)
	})
}
