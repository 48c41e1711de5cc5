package agent_test

import (
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
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

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/keyset"
	"github.com/renewd/renewd/internal/server"
)

// Whenever the agent says that a tainted authority is settled, no workload that lives
// has a valid SVID of it that it was handed here, and neither has the agent, in memory
// or in a file that a restart would load. That is read at the clients, over random
// histories of restarts and kills of the agent, of workloads that are stopped, killed,
// do not read, come back late or only ask once, of evictions, outages, a server that
// lags, and taints. And it is said: minutes after everything is in order again.
//
// RENEWD_SEED replays one history; RENEWD_HISTORIES sets how many there are.
func TestSettledIsTrueAtTheReader(t *testing.T) {
	histories := 12
	if n, err := strconv.Atoi(os.Getenv("RENEWD_HISTORIES")); err == nil {
		histories = n
	}
	base := rand.Uint64()
	if seed, err := strconv.ParseUint(os.Getenv("RENEWD_SEED"), 10, 64); err == nil {
		base, histories = seed, 1
	}
	var said atomic.Int64
	t.Run("histories", func(t *testing.T) {
		for i := range histories {
			seed := base + uint64(i)
			t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
				keeping(t, 0, func(w *world) {
					w.cfg.TaintDelay, w.cfg.CacheSize, w.unchecked = 2*time.Second, 2, true
					w.cfg.EntryRemovalDelay = time.Second
				}, func(w *world) {
					h := &readers{w: w, r: rand.New(rand.NewPCG(seed, 0)), signers: make(map[string]string)}
					h.play()
					said.Add(int64(h.said))
				})
			})
		}
	})
	// A check of nothing would pass, too.
	if histories >= 12 && said.Load() == 0 {
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
	signers   map[string]string // authorities of certificates that were looked at
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
	stopped bool
}

type clientModel struct {
	stream *stream
	has    *update   // in its last stream but one
	back   time.Time // when it opens the next stream; zero while it has one
	read   func()    // has the connection read again; nil while it is
}

const readerEntries = 3

func (h *readers) play() {
	w := h.w
	var entries []server.Entry
	for i := range readerEntries {
		e := entryFor(i)
		e.X509TTL = time.Hour
		entries = append(entries, e)
	}
	w.enter(entries)
	h.keysets = []keyset.Keyset{w.server.Keysets().Active()}
	time.Sleep(8 * time.Second)
	for range 3 {
		h.begin()
	}
	defer func() {
		for _, p := range h.workloads {
			p.kill()
		}
	}()
	h.pass(5 * time.Second)
	for range 14 {
		op := h.r.IntN(18)
		p := h.workloads[h.r.IntN(len(h.workloads))]
		h.past = append(h.past, fmt.Sprintf("%d/%d", op, p.name.PID))
		switch op {
		case 0, 1, 14, 15:
			h.rotate()
		case 2, 3:
			h.restart()
		case 4, 16:
			// Of clients that come back one by one those that are late are known
			// by the time that they have; a stopped process has no time.
			if back := h.away(p); back == 0 || back == len(p.clients) {
				p.stop()
				p.stopped = true
			}
		case 5:
			h.resume(p)
		case 6:
			p.kill()
			h.workloads = slices.DeleteFunc(h.workloads, func(o *workloadModel) bool { return o == p })
			h.begin()
		case 7:
			if !p.asks && !p.stopped && len(p.clients) < 3 {
				p.clients = append(p.clients, &clientModel{stream: p.open()})
			}
		case 8:
			for _, c := range p.clients {
				if !p.stopped && c.back.IsZero() && h.r.IntN(2) == 0 {
					c.lost(h)
				}
			}
		case 9, 17:
			if len(p.clients) > 0 && !p.stopped {
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
			h.pass(time.Duration(h.r.IntN(300)) * time.Second)
		}
		h.pass(time.Duration(h.r.IntN(60)) * time.Second)
	}
	h.end()
}

// begin starts a workload with one or two clients, or one that asks.
func (h *readers) begin() {
	p := &workloadModel{process: h.w.begin(fmt.Sprint(h.r.IntN(readerEntries)), fmt.Sprint(h.r.IntN(readerEntries)))}
	if p.asks = h.r.IntN(3) == 0; !p.asks {
		for range 1 + h.r.IntN(2) {
			p.clients = append(p.clients, &clientModel{stream: p.open()})
		}
	}
	h.workloads = append(h.workloads, p)
}

// rotate activates a new keyset, and taints one that was replaced.
func (h *readers) rotate() {
	w := h.w
	var old []keyset.Keyset
	for _, k := range h.keysets {
		if !slices.ContainsFunc(h.tainted, func(t keyset.Keyset) bool { return t.ID == k.ID }) && k.ID != w.server.Keysets().Active().ID {
			old = append(old, k)
		}
	}
	if len(old) == 0 || h.r.IntN(3) == 0 {
		// An operator goes on when the agents have the new bundle: without it they
		// trust no server that uses it.
		w.set(func(f *faults) { f.down = false })
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
		old = append(old, w.server.Keysets().Active())
		w.check(w.server.Keysets().Activate(w.t.Context(), next.ID))
		h.keysets = append(h.keysets, next)
		h.pass(time.Duration(h.r.IntN(30)) * time.Second)
	}
	k := old[h.r.IntN(len(old))]
	w.check(w.server.Keysets().Taint(w.t.Context(), k.ID))
	h.tainted = append(h.tainted, k)
}

// restart restarts the agent, or kills it and starts it again: then its files are as
// they were.
func (h *readers) restart() {
	w := h.w
	kill := h.r.IntN(2) == 0
	synctest.Wait()
	data, runtime := w.cfg.DataDir, w.cfg.RuntimeDir
	var saved [2]string
	if kill {
		for i, dir := range []string{data, runtime} {
			saved[i] = dir + ".then"
			w.check(os.CopyFS(saved[i], os.DirFS(dir)))
		}
	}
	w.stopAgent()
	if kill {
		for i, dir := range []string{data, runtime} {
			w.check(os.RemoveAll(dir))
			w.check(os.Rename(saved[i], dir))
			w.check(os.Chmod(dir, 0o700))
		}
	}
	if h.r.IntN(2) == 0 {
		time.Sleep(time.Duration(h.r.IntN(120)) * time.Second)
	}
	w.startAgent()
	for _, p := range h.workloads {
		for _, c := range p.clients {
			if c.back.IsZero() {
				c.lost(h)
			}
		}
	}
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

// away counts the clients that have not come back.
func (h *readers) away(p *workloadModel) (n int) {
	for _, c := range p.clients {
		if !c.back.IsZero() {
			n++
		}
	}
	return n
}

func (h *readers) resume(p *workloadModel) {
	if !p.stopped {
		return
	}
	p.stopped = false
	p.resume()
	for _, c := range p.clients {
		if !c.back.IsZero() {
			c.back = time.Now().Add(time.Duration(h.r.IntN(144)) * time.Second)
		}
	}
}

// pass lets time pass, has the workloads do what they do, and looks.
func (h *readers) pass(d time.Duration) {
	for end := time.Now().Add(d); ; {
		h.check()
		if !time.Now().Before(end) {
			return
		}
		time.Sleep(time.Duration(100+h.r.IntN(8000)) * time.Millisecond)
		synctest.Wait()
		for _, p := range h.workloads {
			if p.stopped {
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

// check compares what the agent says with what is.
func (h *readers) check() {
	w := h.w
	synctest.Wait()
	for _, k := range h.tainted {
		a := w.authority(k)
		if !settled(a) {
			continue
		}
		h.said++
		if who := h.uses(k.X509AuthorityID); who != "" {
			w.t.Fatalf("after %v: authority %s is said to be settled, but a valid SVID of it is with %s", h.past, k.X509AuthorityID, who)
		}
	}
}

// uses says who has a valid SVID of an authority, "" if nobody has.
func (h *readers) uses(authority string) string {
	w, now := h.w, time.Now()
	valid := func(u *update) bool { return u != nil && u.ends[authority].After(now) }
	for _, p := range h.workloads {
		if valid(p.asked) {
			return fmt.Sprintf("workload %d, which has asked", p.name.PID)
		}
		for _, c := range p.clients {
			has := c.has
			if last, ok := c.stream.last(); ok {
				has = &last
			}
			if valid(has) {
				return fmt.Sprintf("workload %d (stopped: %v, back: %v)", p.name.PID, p.stopped, c.back)
			}
		}
	}
	for i := range readerEntries {
		for _, id := range w.agent.Cache().Match([]cache.Selector{{Type: "test", Value: fmt.Sprint(i)}}).Identities {
			if h.signed(id.SVID.Leaf, now) == authority {
				return "the cache for " + id.Entry.ID
			}
		}
	}
	var identity struct{ Chain [][]byte }
	if raw, err := os.ReadFile(filepath.Join(w.cfg.DataDir, "identity.json")); err == nil {
		w.check(json.Unmarshal(raw, &identity))
		if h.signed(identity.Chain[0], now) == authority {
			return "the agent, in data_dir"
		}
	}
	kept, err := filepath.Glob(filepath.Join(w.cfg.RuntimeDir, "*.json"))
	w.check(err)
	for _, file := range kept {
		var record struct{ SVID struct{ Leaf []byte } }
		if raw, err := os.ReadFile(file); err == nil && json.Unmarshal(raw, &record) == nil && h.signed(record.SVID.Leaf, now) == authority {
			return file
		}
	}
	return ""
}

// signed is the authority of a certificate that is valid.
func (h *readers) signed(der []byte, now time.Time) string {
	key := string(der)
	if _, known := h.signers[key]; !known {
		cert, err := x509.ParseCertificate(der)
		h.w.check(err)
		h.signers[key] = hex.EncodeToString(cert.AuthorityKeyId) + " " + strconv.FormatInt(cert.NotAfter.Unix(), 10)
	}
	var id string
	var end int64
	_, err := fmt.Sscan(h.signers[key], &id, &end)
	h.w.check(err)
	if now.Unix() >= end {
		return ""
	}
	return id
}

// end puts everything in order. Settled is said then: when the last client is back,
// the wave is over and the clients of a process have had their time.
func (h *readers) end() {
	w := h.w
	w.set(func(f *faults) { *f = faults{} })
	for _, p := range h.workloads {
		h.resume(p)
		for _, c := range p.clients {
			if c.read != nil {
				c.read()
				c.read = nil
			}
		}
	}
	for range 3 {
		h.pass(3 * time.Minute)
	}
	for _, k := range h.tainted {
		if a := w.authority(k); !settled(a) {
			w.t.Fatalf("after %v and nine minutes in order: not settled: %+v; ready: %v", h.past, a, w.agent.Ready())
		}
	}
}
