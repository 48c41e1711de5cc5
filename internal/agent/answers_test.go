package agent_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// Lagging replicas never cost a workload its identity, and never give it another one.
// In random histories replicas lag by up to 25 s, drop some or most entries for a while,
// and have none after an attestation; entries are created, edited and deleted; the server
// is down, or does not sign; the agent is restarted.
//
// RENEWD_SEED replays one history; RENEWD_HISTORIES sets how many there are.
func TestAnswersNeverRemoveOrMisassignAnIdentity(t *testing.T) {
	histories := 3
	if n, err := strconv.Atoi(os.Getenv("RENEWD_HISTORIES")); err == nil {
		histories = n
	}
	base := rand.Uint64()
	if seed, err := strconv.ParseUint(os.Getenv("RENEWD_SEED"), 10, 64); err == nil {
		base, histories = seed, 1
	}
	for i := range histories {
		seed := base + uint64(i)
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			dir, err := os.MkdirTemp("", "renewd-token")
			if err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(dir)
			inWorldWithRuntimeDir(t, 0, func(w *world) {
				token := dir + "/token"
				w.check(os.WriteFile(token, []byte(w.cfg.JoinToken), 0o600))
				w.cfg.JoinToken, w.cfg.JoinTokenFile = "", token
			}, func(w *world) {
				h := &answers{w: w, r: rand.New(rand.NewPCG(seed, 0)), checked: make(map[*stream]int), brought: make(map[string]*cache.Entry)}
				h.play()
			})
		})
	}
}

// answers is a history of answers with entries.
type answers struct {
	w *world
	r *rand.Rand

	mu    sync.Mutex
	lists []entryList // of the correct server

	moving  []spireapi.Entry // edited in place, created and deleted
	lasting []*stream        // each with an entry that does not change
	others  []*stream
	checked map[*stream]int         // updates checked
	brought map[string]*cache.Entry // the latest state that the agent has received
}

// entryList is a list of entries, and since when it was the server's.
type entryList struct {
	at   time.Time
	list []*types.Entry
}

const (
	lasting = 6 // entries that do not change
	moving  = 5 // entries that change
	places  = 4 // selectors of the moving entries
)

func (h *answers) play() {
	w := h.w
	for range moving {
		h.moving = append(h.moving, spireapi.Entry{})
	}
	for i := range h.moving {
		h.edit(i)
	}
	h.correct()
	h.open()
	defer h.close()
	h.pass(10 * time.Second)
	for range 25 {
		switch h.r.IntN(10) {
		case 0, 1, 2:
			h.edit(h.r.IntN(moving))
			h.pass(time.Duration(h.r.IntN(15)) * time.Second)
		case 3:
			i := h.r.IntN(moving)
			h.moving[i].ID = "" // deleted
			h.setEntries()
			h.pass(time.Duration(h.r.IntN(60)) * time.Second)
		case 4:
			w.set(func(f *faults) { f.down = true })
			h.edit(h.r.IntN(moving))
			h.pass(time.Duration(h.r.IntN(300)) * time.Second)
			h.correct()
		case 5:
			w.set(func(f *faults) { f.signing = time.Hour })
			h.edit(h.r.IntN(moving))
			h.pass(time.Duration(h.r.IntN(60)) * time.Second)
			h.correct()
		case 6, 7:
			list, longest := h.lagging()
			w.replica(list)
			h.pass(time.Duration(h.r.Int64N(int64(longest) / 2)))
			h.edit(h.r.IntN(moving))
			h.pass(time.Duration(h.r.Int64N(int64(longest) / 2)))
			h.correct()
		case 8:
			token, err := w.server.CreateJoinToken(w.t.Context(), time.Hour, "")
			w.check(err)
			w.check(os.WriteFile(w.cfg.JoinTokenFile, []byte(token.Value), 0o600))
			w.replica(none)
			w.check(w.server.EvictAgent(w.t.Context(), spiffeid.RequireFromString(w.agent.State().OwnID), true))
			h.pass(90 * time.Second)
			h.correct()
		case 9:
			h.restart()
		}
	}
	h.correct()
	h.pass(5 * time.Minute)
	h.converged()
}

func none([]*types.Entry) []*types.Entry { return nil }

// edit changes a moving entry.
func (h *answers) edit(i int) {
	e := &h.moving[i]
	if e.ID == "" {
		e.ID, e.X509TTL = fmt.Sprint("moving-", i), time.Hour
	}
	change := 1 + h.r.IntN(3)
	if change&1 != 0 || e.SPIFFEID.IsZero() {
		e.SPIFFEID = spiffeid.RequireFromPathf(td, "/moving/%d", h.r.IntN(3))
	}
	if change&2 != 0 || e.Selectors == nil {
		e.Selectors = []spireapi.Selector{{Type: "test", Value: fmt.Sprint("place-", h.r.IntN(places))}}
	}
	h.setEntries()
}

// setEntries sets the server's entries to the lasting and the moving ones.
func (h *answers) setEntries() {
	var entries []spireapi.Entry
	for i := range lasting {
		e := entryFor(i)
		e.X509TTL = time.Hour
		entries = append(entries, e)
	}
	for _, e := range h.moving {
		if e.ID != "" {
			entries = append(entries, e)
		}
	}
	h.w.setEntries(entries)
	var list []*types.Entry
	for _, e := range h.w.server.Entries() {
		list = append(list, wireEntry(e))
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lists = append(h.lists, entryList{time.Now(), list})
}

// entriesAgo returns the list of entries at an earlier time.
func (h *answers) entriesAgo(ago time.Duration) []*types.Entry {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, l := range slices.Backward(h.lists) {
		if time.Since(l.at) >= ago {
			return l.list
		}
	}
	return h.lists[0].list
}

// lagging returns a random replica, and how long the agent may ask only that one.
func (h *answers) lagging() (list func([]*types.Entry) []*types.Entry, longest time.Duration) {
	lag := time.Duration(h.r.IntN(25)) * time.Second
	behind := func([]*types.Entry) []*types.Entry { return h.entriesAgo(lag) }
	dropped := make(map[string]bool)
	without := func(now []*types.Entry) []*types.Entry {
		return slices.DeleteFunc(slices.Clone(now), func(e *types.Entry) bool { return dropped[e.Id] })
	}
	drop := func(n int) {
		for _, i := range h.r.Perm(lasting + moving)[:n] {
			if i < lasting {
				dropped[entryID(i)] = true
			} else {
				dropped[fmt.Sprint("moving-", i-lasting)] = true
			}
		}
	}
	switch h.r.IntN(5) {
	case 0:
		return behind, 25 * time.Second
	case 1:
		drop(1 + h.r.IntN(4))
		return without, 25 * time.Second
	case 2:
		drop(8)
		return without, 25 * time.Second
	case 3:
		return none, 150 * time.Second
	}
	// Each sync asks another replica; every 24 s it is the correct one.
	drop(4)
	first := h.r.IntN(4)
	return func(now []*types.Entry) []*types.Entry {
		switch (int(time.Now().Unix())/6 + first) % 4 {
		case 0:
			return behind(now)
		case 1:
			return without(now)
		case 2:
			return none(now)
		}
		return now
	}, 3 * time.Minute
}

// restart restarts the agent. Workloads reconnect after a moment.
func (h *answers) restart() {
	w := h.w
	w.stopAgent()
	h.close()
	if h.r.IntN(2) == 0 {
		h.edit(h.r.IntN(moving)) // while the agent is stopped
	}
	switch h.r.IntN(4) {
	case 0:
		w.set(func(f *faults) { f.down = true })
	case 1:
		w.replica(none)
	case 2:
		w.replica(func([]*types.Entry) []*types.Entry { return h.entriesAgo(25 * time.Second) })
	}
	w.startAgent()
	before := h.brought
	h.brought = make(map[string]*cache.Entry)
	for id, e := range w.agent.Cache().Entries() {
		if was := before[id]; was != nil && earlier(e, was) {
			w.t.Errorf("entry %s is restored as of revision %d, and %d was known", id, e.Revision, was.Revision)
		}
		h.brought[id] = e
	}
	h.open()
	h.pass(20 * time.Second)
	for _, s := range h.lasting {
		if _, ok := s.last(); !ok {
			w.t.Errorf("the workload with %q got no answer within 20 s of the restart", s.values)
		}
	}
	h.correct()
}

// correct makes the agent ask the correct server, so that the entries missing from one
// replica and from the next do not add up.
func (h *answers) correct() {
	h.w.correct()
	h.check()
}

func (h *answers) open() {
	for i := range lasting {
		h.lasting = append(h.lasting, h.w.openAs(fmt.Sprint(i), fmt.Sprint("place-", i%places)))
	}
	h.others = make([]*stream, places)
}

func (h *answers) close() {
	for _, s := range slices.Concat(h.lasting, h.others) {
		if s != nil {
			s.close()
			delete(h.checked, s)
		}
	}
	h.lasting, h.others = nil, nil
}

// pass waits and checks.
func (h *answers) pass(d time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end); {
		time.Sleep(time.Duration(300+h.r.IntN(4000)) * time.Millisecond)
		h.check()
	}
}

// check checks the updates of every stream since the last check, and the entries that
// the agent has received.
func (h *answers) check() {
	w := h.w
	w.t.Helper()
	synctest.Wait()
	for i, s := range slices.Concat(h.lasting, h.others) {
		if s == nil {
			continue
		}
		s.mu.Lock()
		updates, end := s.updates[h.checked[s]:], s.end
		h.checked[s] = len(s.updates)
		s.mu.Unlock()
		for _, u := range updates {
			for _, id := range u.ids {
				if !w.assigns(id, s.values, h.inForce) {
					w.t.Errorf("a workload with %q was shown %s at %v, which its entry gave it in an earlier state only", s.values, id, u.at)
				}
			}
			if i < lasting && !slices.Contains(u.ids, entryFor(i).SPIFFEID.String()) {
				w.t.Errorf("the workload with %q was shown %v alone", s.values, u.ids)
			}
		}
		if i < lasting && end != nil {
			w.t.Fatalf("the stream of the workload with %q ended: %v", s.values, end)
		}
	}
	for id, e := range w.agent.Cache().Entries() {
		if was := h.brought[id]; was != nil && earlier(e, was) {
			w.t.Errorf("entry %s stepped back from revision %d to %d", id, was.Revision, e.Revision)
		}
		h.brought[id] = e
	}
	for i := range h.others {
		if h.r.IntN(5) > 0 {
			continue // refused clients retry with pauses
		}
		if s := h.others[i]; s != nil {
			select {
			case <-s.done:
				s.close()
				delete(h.checked, s)
			default:
				continue
			}
		}
		h.others[i] = w.openAs(fmt.Sprint("place-", i))
	}
}

// inForce reports whether the agent has received no later state of the entry.
func (h *answers) inForce(e spireapi.StoredEntry) bool {
	was := h.brought[e.ID]
	return was == nil || !earlier(&cache.Entry{Revision: e.Revision, CreatedAt: time.Unix(e.CreatedAt.Unix(), 0)}, was)
}

func earlier(a, b *cache.Entry) bool {
	if !a.CreatedAt.Equal(b.CreatedAt) {
		return a.CreatedAt.Before(b.CreatedAt)
	}
	return a.Revision < b.Revision
}

// converged checks that the agent has the entries of the server.
func (h *answers) converged() {
	w := h.w
	for _, s := range h.lasting {
		s.checkUnbroken()
	}
	held := w.agent.Cache().Entries()
	all := w.server.Entries()
	for _, e := range all {
		if got := held[e.ID]; got == nil || got.Revision != e.Revision || got.SPIFFEID != e.SPIFFEID {
			w.t.Errorf("entry %s is held as %+v", e.ID, got)
		}
	}
	if missing := w.agent.State().EntriesMissing; len(held) != len(all) || missing > 0 {
		w.t.Errorf("%d entries held, %d of them missing, the server has %d", len(held), missing, len(all))
	}
	for i := range places {
		at := slices.ContainsFunc(all, func(e spireapi.StoredEntry) bool { return e.Selectors[0].Value == fmt.Sprint("place-", i) })
		if _, err := w.askAs(fmt.Sprint("place-", i)); isCode(err, codes.PermissionDenied) == at || (at && err != nil) {
			w.t.Errorf("a caller at place %d: %v; an entry matches it: %v", i, err, at)
		}
	}
}
