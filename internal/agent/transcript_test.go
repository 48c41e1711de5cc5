package agent_test

import (
	"encoding/binary"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing/synctest"
	"time"

	"github.com/rogpeppe/go-internal/diff"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/renew/wave"
)

var updateTranscripts = flag.Bool("update", false, "write testdata/transcripts")

// transcript writes down what happens in a world, for comparison with a file: chosen
// messages of the agent's log, what its workloads read, and the server's view. A file has
// sections, each with a clock of its own, because most polls and pauses are random: a
// section begins with an event whose time is random, and has only events whose time since
// then is not. What happens at one instant has a fixed order, not that of the goroutines.
type transcript struct {
	w        *world
	tainted  keyset.Keyset // the active one at the start, authority A
	streams  []*stream
	sections []section

	mu     sync.Mutex
	events []event
}

// transcriptDelay is the delay of the active authority's taint wave in transcripts, to
// the millisecond. It is not a multiple of a transcript's unit, so that rounding is stable.
const transcriptDelay = 12345 * time.Millisecond

// transcribe begins a transcript of a world whose agent was not started yet. The delay is
// computed from the seed in data_dir and from the authority's ID, which is random:
// transcribe searches for a seed that gives transcriptDelay.
func transcribe(w *world) *transcript {
	tr := &transcript{w: w, tainted: w.server.Keysets().Active()}
	var seed [32]byte
	for n := uint64(0); wave.Delay(seed, tr.tainted.X509AuthorityID, w.cfg.TaintDelay).Truncate(time.Millisecond) != transcriptDelay; n++ {
		binary.BigEndian.PutUint64(seed[:], n)
	}
	w.check(os.WriteFile(filepath.Join(w.cfg.DataDir, "seed"), seed[:], 0o600))
	w.cfg.Log = slog.New(&transcriptHandler{w.logs.Handler(), tr})
	return tr
}

func (tr *transcript) add(e event) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.events = append(tr.events, e)
}

// authority names the authority that is active at the start A, and any other B.
func (tr *transcript) authority(id string) string {
	if id == tr.tainted.X509AuthorityID {
		return "authority A"
	}
	return "authority B"
}

// open opens the stream of a workload, whose answers are part of the transcript.
func (tr *transcript) open(i int) *stream {
	s := tr.w.open(i)
	tr.streams = append(tr.streams, s)
	return s
}

// begin begins a section, with the first event that has the message and comes after the
// last section began. It waits for that event.
func (tr *transcript) begin(title, message string, unit, limit time.Duration) {
	tr.w.t.Helper()
	after := tr.from()
	tr.w.until(message, limit, func() bool {
		tr.mu.Lock()
		defer tr.mu.Unlock()
		i := slices.IndexFunc(tr.events, func(e event) bool { return e.what == message && e.at.After(after) })
		if i >= 0 {
			tr.sections = append(tr.sections, section{title: title, from: tr.events[i].at, unit: unit})
		}
		return i >= 0
	})
}

// beginNow begins a section with what the drill does now.
func (tr *transcript) beginNow(title string, unit time.Duration) {
	synctest.Wait()
	tr.sections = append(tr.sections, section{title: title, from: time.Now(), unit: unit})
}

// beginUnnamed is begin for a section in which it is random which SVID waits for what.
func (tr *transcript) beginUnnamed(title, message string, limit time.Duration) {
	tr.w.t.Helper()
	tr.begin(title, message, exact, limit)
	tr.sections[len(tr.sections)-1].unnamed = true
}

// from returns when the section began, zero before the first one.
func (tr *transcript) from() time.Time {
	if len(tr.sections) == 0 {
		return time.Time{}
	}
	return tr.sections[len(tr.sections)-1].from
}

// beginRotation activates the next keyset, taints the active one and begins the first
// section when the agent reads the taint.
func (tr *transcript) beginRotation() {
	tr.w.t.Helper()
	old := tr.w.activate()
	tr.w.check(tr.w.server.Keysets().Taint(tr.w.t.Context(), old.ID))
	tr.begin("The agent reads the taint.", messageTainted, exact, 10*time.Second)
}

// pass waits until d after the beginning of the section.
func (tr *transcript) pass(d time.Duration) {
	tr.w.t.Helper()
	left := time.Until(tr.from().Add(d))
	if left < 0 {
		tr.w.t.Fatalf("%v of the section have passed %v ago", d, -left)
	}
	time.Sleep(left)
	synctest.Wait()
}

// untilSettled waits until the tainted authority is settled, which it checks every 100 ms
// of the section.
func (tr *transcript) untilSettled(limit time.Duration) {
	tr.w.t.Helper()
	d := time.Since(tr.from()).Truncate(100 * time.Millisecond)
	for end := d + limit; !settled(tr.w.authority(tr.tainted)); {
		if d += 100 * time.Millisecond; d > end {
			tr.w.t.Fatalf("not settled within %v: %+v", limit, tr.w.authority(tr.tainted))
		}
		tr.pass(d)
	}
	tr.figures()
}

// figures adds the agent's figures for the tainted authority.
func (tr *transcript) figures() {
	synctest.Wait()
	a := tr.w.authority(tr.tainted)
	tr.addFigures(0, "authority "+string(a.State), tr.authority(a.ID), fmt.Sprintf("held=%d pending=%d streams=%d", a.Held, a.Pending, a.Streams))
}

func (tr *transcript) addFigures(order int, what, who, how string) {
	tr.add(event{at: time.Now(), kind: kindFigures, section: len(tr.sections), order: order, what: what, who: who, how: how})
}

// asked adds how many SVIDs the server was asked for in the section.
func (tr *transcript) asked() {
	var at []time.Time
	for _, m := range tr.w.mintsSince(tr.from()) {
		for range max(len(m.entries), 1) {
			at = append(at, m.at)
		}
	}
	most := 0
	for i := range at {
		n := 0
		for _, other := range at[i:] {
			if other.Sub(at[i]) < time.Second {
				n++
			}
		}
		most = max(most, n)
	}
	tr.addFigures(0, "SVIDs asked of the server", "", fmt.Sprintf("%d, at most %d in any second", len(at), most))
}

// attempts adds the pauses of all SVIDs after each of their first n attempts in the
// transcript, and after all later ones.
func (tr *transcript) attempts(n int) {
	pauses := make([][]time.Duration, n+1)
	began := make(map[string]time.Time)
	tried := make(map[string]int)
	for _, e := range tr.all() {
		switch {
		case e.kind != kindSVID:
		case e.states[1] == "backing_off":
			began[e.who] = e.at
		case e.states[0] == "backing_off":
			i := min(tried[e.who], n)
			pauses[i] = append(pauses[i], e.at.Sub(began[e.who]))
			tried[e.who]++
		}
	}
	for i, p := range pauses {
		what := fmt.Sprintf("pause after attempt %d", i+1)
		if i == n {
			what = "pause after each later one"
		}
		tr.addPauses(i, what, p, time.Second, 2, 4, 8, 16, 32, 60)
	}
}

// probes adds the pauses between the mints of the section.
func (tr *transcript) probes() {
	var pauses []time.Duration
	var last time.Time
	for _, e := range tr.all() {
		if e.kind != kindSVID || e.states[1] != "minting" || e.at.Before(tr.from()) {
			continue
		}
		if !last.IsZero() {
			pauses = append(pauses, e.at.Sub(last))
		}
		last = e.at
	}
	tr.addPauses(0, "pause between probes", pauses, 100*time.Millisecond, 1, 2, 3, 4, 5)
}

// addPauses adds the bounds of random pauses: the least possible one, if none is below it,
// and the lowest of some bounds in seconds that none is above. There are so many pauses
// that one of them is above the next lower bound, in all but one of 2^18 cases.
func (tr *transcript) addPauses(order int, what string, pauses []time.Duration, least time.Duration, bounds ...int) {
	longest, most := slices.Max(pauses), "more"
	for _, s := range slices.Backward(bounds) {
		if bound := time.Duration(s) * time.Second; longest <= bound {
			most = bound.String()
		}
	}
	tr.addFigures(order, what, "", fmt.Sprintf("at least %v, at most %s", min(slices.Min(pauses), least), most))
}

// compare compares the transcript with testdata/transcripts/NAME.txt. If the flag -update is
// given and the drill has not failed, it writes the file. head is the file's beginning.
func (tr *transcript) compare(name, head string) {
	tr.w.t.Helper()
	got := []byte(head + tr.render())
	file := filepath.Join("testdata", "transcripts", name+".txt")
	if *updateTranscripts && !tr.w.t.Failed() {
		tr.w.check(os.MkdirAll(filepath.Dir(file), 0o755))
		tr.w.check(os.WriteFile(file, got, 0o644))
		return
	}
	want, err := os.ReadFile(file)
	tr.w.check(err)
	if d := diff.Diff(file, want, "this run", got); d != nil {
		tr.w.t.Errorf("the drill differs from its transcript; if the change is meant, run this test with -update\n%s", d)
	}
}

func (tr *transcript) render() string {
	var b strings.Builder
	events := tr.all()
	for i, s := range tr.sections {
		in := slices.DeleteFunc(slices.Clone(events), func(e event) bool {
			if e.section > 0 {
				return e.section != i+1
			}
			return e.at.Before(s.from) || i+1 < len(tr.sections) && !e.at.Before(tr.sections[i+1].from)
		})
		fmt.Fprintf(&b, "\n%s\n", s.title)
		for _, l := range s.lines(in) {
			b.WriteString(l.text(s.unit))
		}
	}
	return b.String()
}
