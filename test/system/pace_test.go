package system_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// A wave of 1,000 SVIDs with a SPIRE server over a network that stalls: the server's log
// has at most 20 of them in any second.
func TestWaveUnderSPIRE(t *testing.T) {
	t.Parallel()
	run(t, "spire-wave.txtar", withSPIRE(t))
}

type stallsKey struct{}

// stalls is a network that lets nothing pass for up to three seconds, then all at
// once, then what comes within 20 ms, for up to three seconds.
type stalls struct {
	mu     sync.Mutex
	on     bool
	random *rand.Rand
	closed bool
	until  time.Time // end of the current phase
	count  int
	time   time.Duration // total time closed
}

// wait returns when data that has just arrived may pass.
func (s *stalls) wait() {
	s.mu.Lock()
	now := time.Now()
	var left time.Duration
	if s.on {
		for !s.until.After(now) {
			s.closed = !s.closed
			d := time.Duration(s.random.Int64N(int64(3 * time.Second)))
			s.until = now.Add(d)
			if s.closed {
				s.count++
				s.time += d
			}
		}
		if s.closed {
			left = s.until.Sub(now)
		}
		left += time.Duration(s.random.Int64N(int64(20 * time.Millisecond)))
	}
	s.mu.Unlock()
	time.Sleep(left)
}

// stalling reads through such a network.
type stalling struct {
	io.Reader
	network *stalls
}

func (r stalling) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	r.network.wait()
	return n, err
}

// stall PORT TARGET forwards connections to a port. After stall begin both directions
// stall at random, independently.
func stall(ts *testscript.TestScript, neg bool, args []string) {
	both := ts.Value(stallsKey{}).(*[2]stalls)
	if len(args) == 1 && args[0] == "begin" {
		seed := rand.Uint64()
		ts.Logf("the network stalls by seed %d", seed)
		for i := range both {
			s := &both[i]
			s.mu.Lock()
			s.on, s.random = true, rand.New(rand.NewPCG(seed, uint64(i)))
			s.mu.Unlock()
		}
		return
	}
	if len(args) != 2 {
		ts.Fatalf("usage: stall PORT TARGET | begin")
	}
	ts.Check(ts.Value(balancersKey{}).(*balancers).start(args[0], args[1:], route{
		there: func(r io.Reader) io.Reader { return stalling{r, &both[0]} },
		back:  func(r io.Reader) io.Reader { return stalling{r, &both[1]} },
	}))
}

// spire-entries N PARENT FILE writes N entries in the format of spire-server.
func spireEntries(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 3 {
		ts.Fatalf("usage: spire-entries N PARENT FILE")
	}
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	type selector struct {
		Type  string `json:"type"`
		Value string `json:"value"`
	}
	type entry struct {
		Selectors []selector `json:"selectors"`
		SPIFFEID  string     `json:"spiffe_id"`
		ParentID  string     `json:"parent_id"`
	}
	var list struct {
		Entries []entry `json:"entries"`
	}
	for i := range n {
		list.Entries = append(list.Entries, entry{
			Selectors: []selector{{"unix", fmt.Sprintf("uid:%d", 100_000+i)}},
			SPIFFEID:  fmt.Sprintf("spiffe://example.org/workload/%d", i),
			ParentID:  args[1],
		})
	}
	text, err := json.Marshal(list)
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[2]), text, 0o600))
}

// paced N TOTAL LOG LINE checks that a SPIRE server's log, which is in JSON, has at
// least TOTAL SVIDs of an agent and its workloads after a line with the text LINE,
// and at most N of them in any one second.
func paced(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 4 {
		ts.Fatalf("usage: paced N TOTAL LOG LINE")
	}
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	total, err := strconv.Atoi(args[1])
	ts.Check(err)
	log, err := os.ReadFile(ts.MkAbs(args[2]))
	ts.Check(err)
	_, log, found := bytes.Cut(log, []byte(args[3]))
	if !found {
		ts.Fatalf("%s has no %q", args[2], args[3])
	}
	var signed []time.Time
	for text := range bytes.Lines(log[bytes.IndexByte(log, '\n')+1:]) {
		var line struct {
			Time    time.Time
			Message string `json:"msg"`
			Entry   string `json:"entry_id"`
		}
		ts.Check(json.Unmarshal(text, &line))
		if line.Message == "Renewing agent SVID" || line.Message == "Signed X509 SVID" && line.Entry != "" {
			signed = append(signed, line.Time)
		}
	}
	slices.SortFunc(signed, time.Time.Compare)
	most, from := 0, 0
	for i, at := range signed {
		for at.Sub(signed[from]) >= time.Second {
			from++
		}
		most = max(most, i-from+1)
	}
	if len(signed) < total {
		ts.Fatalf("%d SVIDs signed, want at least %d", len(signed), total)
	}
	both := ts.Value(stallsKey{}).(*[2]stalls)
	ts.Logf("%d SVIDs signed in %v, at most %d in any second", len(signed), signed[len(signed)-1].Sub(signed[0]).Round(time.Millisecond), most)
	for i, way := range []string{"there", "back"} {
		both[i].mu.Lock()
		ts.Logf("on the way %s the network stalled %d times, for %v in all", way, both[i].count, both[i].time.Round(time.Millisecond))
		both[i].mu.Unlock()
	}
	if most > n {
		ts.Fatalf("%d SVIDs signed within one second, want at most %d", most, n)
	}
}
