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

// Whenever the agent says that a tainted authority is settled, no workload that lives
// has a valid SVID of it that it was handed here, and neither has the agent, in memory
// or in a file that a restart would load, and none is on its way that was asked for
// before the taint was seen. That is read at the clients, over random histories of
// restarts and kills of the agent, of workloads that are stopped, killed, do not read,
// come back late, are attested slowly or only ask once, of evictions, outages, SVIDs
// that end, a server that lags, attestations of the agent, a full disk, a runtime_dir
// that is out of reach, and taints. And it is said: minutes after everything
// is in order again, and where workloads do not go on, once their SVIDs have ended.
//
// An agent without runtime_dir knows of workloads that come back in time, and its
// histories have no others.
//
// RENEWD_SEED replays one history; RENEWD_HISTORIES sets how many there are.
func TestSettledIsTrueAtTheReader(t *testing.T) {
	histories, base := 24, rand.Uint64()
	if n, err := strconv.Atoi(os.Getenv("RENEWD_HISTORIES")); err == nil {
		histories = n
	}
	if seed, err := strconv.ParseUint(os.Getenv("RENEWD_SEED"), 10, 64); err == nil {
		base, histories = seed, 1
	}
	var said atomic.Int64
	t.Run("histories", func(t *testing.T) {
		for i := range histories {
			seed := base + uint64(i)
			t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
				tokens := t.TempDir()
				h := &readers{r: rand.New(rand.NewPCG(seed, 0)), certs: make(map[string]certificate)}
				keeping(t, 0, func(w *world) {
					w.cfg.TaintDelay, w.cfg.CacheSize, w.unchecked = 2*time.Second, 2, true
					w.cfg.EntryRemovalDelay = time.Second
					// Most of what a history costs is what the agent asks again and again.
					w.cfg.RefreshInterval = 20 * time.Second
					if h.forgets = h.r.IntN(4) == 0; h.forgets {
						w.cfg.RuntimeDir = ""
					}
					// It attests more than once.
					h.token = filepath.Join(tokens, "token")
					w.check(os.WriteFile(h.token, []byte(w.cfg.JoinToken), 0o600))
					w.cfg.JoinToken, w.cfg.JoinTokenFile = "", h.token
				}, func(w *world) {
					h.w = w
					h.play()
					said.Add(int64(h.said))
				})
			})
		}
	})
	// A check of nothing would pass, too.
	if histories >= 24 && said.Load() == 0 {
		t.Error("settled was never said")
	}
}

// readers is a history of workloads and what they read.
type readers struct {
	w         *world
	r         *rand.Rand
	keysets   []keyset.Keyset
	tainted   []keyset.Keyset
	workloads []*workloadModel
	forgets   bool                   // no runtime_dir
	token     string                 // path of the join token
	entries   int                    // the last that was added
	certs     map[string]certificate // by what they were read from
	said      int
	past      []string
}

// workloadModel is a process with clients that keep a stream open, or one that asks
// from time to time. Each uses what it read last.
type workloadModel struct {
	*process
	clients []*clientModel
	asks    bool
	asked   *update
}

type clientModel struct {
	stream *stream
	has    *update   // in its last stream but one
	back   time.Time // when it opens the next stream; zero while it has one
	read   func()    // has the connection read again; nil while it is
}

// readerLives are how long the SVIDs of each entry live.
var readerLives = []time.Duration{5 * time.Minute, 10 * time.Minute, 40 * time.Minute}

func (h *readers) play() {
	w := h.w
	w.set(h.clear)
	h.entries = len(readerLives)
	w.enter(entriesFor(h.entries))
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
			if !h.forgets {
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
				// What an agent without runtime_dir knows of a client from before a
				// restart, it knows by its call.
				_, told := c.stream.last()
				if !p.stopped() && c.back.IsZero() && (told || !h.forgets) && h.r.IntN(2) == 0 {
					c.lost(h)
				}
			}
		case 9, 17:
			if h.forgets {
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
			h.late()
		case 21, 22:
			h.reattest()
		case 23:
			h.vanish()
		}
		h.pass(time.Duration(h.r.IntN(60)) * time.Second)
	}
	h.end()
}

// begin starts a workload with one or two clients, or one that asks.
func (h *readers) begin() *workloadModel {
	p := &workloadModel{process: h.w.begin(fmt.Sprint(h.r.IntN(len(readerLives))), fmt.Sprint(h.r.IntN(len(readerLives))))}
	if p.asks = !h.forgets && h.r.IntN(3) == 0; !p.asks {
		for range 1 + h.r.IntN(2) {
			p.clients = append(p.clients, &clientModel{stream: p.open()})
		}
	}
	h.workloads = append(h.workloads, p)
	return p
}

// lost has the client's connection break. It comes back as go-spiffe does: after up to
// 144 s, unless its process is stopped.
func (c *clientModel) lost(h *readers) {
	if c.read != nil {
		c.read = nil // what was not read is lost with the connection
	}
	c.stream.conn.cut()
	c.back = time.Now().Add(time.Duration(h.r.IntN(144)) * time.Second)
	if last, ok := c.stream.last(); ok {
		c.has = &last
	}
}

// returning reports whether a client of the process is going to come back.
func (p *workloadModel) returning() bool {
	return !p.stopped() && slices.ContainsFunc(p.clients, func(c *clientModel) bool { return !c.back.IsZero() })
}

func (h *readers) resume(p *workloadModel) {
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

// pass lets time pass, has the workloads do what they do, and looks.
func (h *readers) pass(d time.Duration) {
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
						c.lost(h)
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

// clear ends all faults. The server's SVIDs have the lives that are wanted here, which
// are shorter than those that it can be given.
func (h *readers) clear(f *faults) {
	*f = faults{life: func(entry string) time.Duration {
		for i, life := range readerLives {
			if entry == entryID(i) {
				return life
			}
		}
		return readerLives[0]
	}}
}

// end puts the server in order, and in most histories the workloads, too. Settled is
// said then: when the last client is back, the wave is over and the clients of a
// process have had their time. A workload that does not go on counts until its SVIDs
// end.
func (h *readers) end() {
	w := h.w
	w.set(h.clear)
	w.attesting.Store(0)
	within := 8 * time.Minute
	if h.r.IntN(4) == 0 {
		within += readerLives[len(readerLives)-1]
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
		w.t.Errorf("after %v and %v in order: not settled: %+v; ready: %v", h.past, within, w.authority(k), w.agent.Ready())
	}
}

func (h *readers) unsettled() []keyset.Keyset {
	state := h.w.agent.State()
	return slices.DeleteFunc(slices.Clone(h.tainted), func(k keyset.Keyset) bool {
		a, _ := authorityOf(state, metrics.TypeX509, k.X509AuthorityID)
		return settled(a)
	})
}
