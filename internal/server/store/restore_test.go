package store_test

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/internal/server/store"
)

// at opens a store with a clock that always shows now.
func at(t testing.TB, path string, now time.Time, log *bytes.Buffer) *store.Store {
	t.Helper()
	o := options()
	o.Now = func() time.Time { return now }
	if log != nil {
		o.Log = slog.New(slog.NewTextHandler(log, nil))
	}
	s, err := store.Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// keysetsAt opens the keysets of a deployment with a clock that always shows now.
func keysetsAt(t testing.TB, d *store.Deployment, now time.Time, lifetime time.Duration) *keyset.Deployment {
	t.Helper()
	k, err := keyset.Open(t.Context(), keyset.Config{TrustDomain: td, Storage: d, Lifetime: lifetime, Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func load(t testing.TB, d *store.Deployment) keyset.Document {
	t.Helper()
	doc, err := d.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

// unknownOf returns what Restored must return for keysets.
func unknownOf(t testing.TB, doc keyset.Document, copied, restored time.Time) ledger.Restored {
	t.Helper()
	out := ledger.Restored{CopiedAt: copied, X509: map[string]time.Time{}, JWT: map[string]time.Time{}}
	for _, r := range doc.Records {
		ca, err := x509.ParseCertificate(r.CA)
		if err != nil {
			t.Fatal(err)
		}
		end := restored.Add(168 * time.Hour)
		if end.After(r.ExpiresAt) {
			end = r.ExpiresAt
		}
		out.X509[hex.EncodeToString(ca.SubjectKeyId)], out.JWT[r.JWTKeyID] = end, r.ExpiresAt
	}
	return out
}

// TestRestore restores a copy of a store that was changed after it.
func TestRestore(t *testing.T) {
	t.Parallel()
	const day = 24 * time.Hour
	copied, restoredAt := start.Add(time.Hour).UTC(), start.Add(30*time.Hour).UTC()
	s := at(t, newPath(t), copied, nil)
	long, short, bare := s.Deployment("long"), s.Deployment("short"), s.Deployment("bare")
	ks := keysetsAt(t, long, start, 90*day)
	next, err := ks.Prepare(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	keysetsAt(t, short, start, 3*day)
	row := ledger.Row{Authority: "a", Agent: "b", NotAfter: start}
	for _, err := range []error{
		bare.PutToken(t.Context(), spireapi.Token{Value: "one"}), long.PutToken(t.Context(), spireapi.Token{Value: "two"}),
		long.PutToken(t.Context(), spireapi.Token{Value: "spent"}), update(t.Context(), long, 1, "1"), long.SaveLedger(t.Context(), ledger.Change{Put: []ledger.Row{row}}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	before := map[string]keyset.Document{"long": load(t, long), "short": load(t, short)}
	path := copyOf(t, s)
	if got := long.Restored(); got != nil {
		t.Errorf("of the original: %+v", got)
	}
	// A change that the copy does not have.
	if err := ks.Activate(t.Context(), next.ID); err != nil {
		t.Fatal(err)
	}
	later := load(t, long)
	closed(t, s)

	// Opening it read-only leaves it a copy.
	o := options()
	o.ReadOnly = true
	reader, err := store.Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	if got := reader.Deployment("long").Restored(); got != nil || load(t, reader.Deployment("long")).Version != 2 {
		t.Errorf("read only: %+v", got)
	}
	closed(t, reader)

	var log bytes.Buffer
	s = at(t, path, restoredAt, &log)
	if text := log.String(); strings.Count(text, "level=WARN") != 1 || !strings.Contains(text, "not known") || !strings.Contains(text, "copied_at=2026-01-02T04:04:05") ||
		!strings.Contains(text, "join_tokens_dropped=3") || !strings.Contains(text, "x509_unknown_until=2026-01-10T09:04:05") {
		t.Errorf("the log says %s", text)
	}
	for name, was := range before {
		d := s.Deployment(name)
		want := unknownOf(t, was, copied, restoredAt)
		if got := d.Restored(); len(got) != 1 || !reflect.DeepEqual(got[0], want) {
			t.Errorf("%s: %+v\nwant %+v", name, got, want)
		}
		doc := load(t, d)
		if doc.Sequence <= later.Sequence+1000 {
			t.Errorf("%s: the sequence is %d, was %d", name, doc.Sequence, was.Sequence)
		}
		was.Version, was.Sequence = was.Version+1, doc.Sequence
		if !reflect.DeepEqual(doc, was) {
			t.Errorf("%s: %+v\nwant %+v", name, doc, was)
		}
		records, err := d.Audit(t.Context(), doc.Version-1, 0)
		states := map[string]keyset.State{}
		for _, r := range was.Records {
			states[r.ID] = r.State
		}
		if err != nil || len(records) != 1 || records[0].Number != doc.Version || records[0].Operation != "restore" || records[0].Actor != "server" ||
			!records[0].At.Equal(restoredAt) || !reflect.DeepEqual(records[0].Before, states) || !reflect.DeepEqual(records[0].After, states) ||
			!strings.Contains(records[0].Note, "2026-01-02 04:04:05 +0000 UTC") {
			t.Errorf("%s: the audit log says %+v, %v", name, records, err)
		}
	}
	for _, name := range []string{"long", "short", "bare"} {
		if left, err := s.Deployment(name).Tokens(t.Context()); err != nil || len(left) > 0 {
			t.Errorf("%s: tokens %+v, %v", name, left, err)
		}
	}
	if got := s.Deployment("bare").Restored(); got != nil || load(t, s.Deployment("bare")).Version != 0 {
		t.Errorf("without keysets: %+v", got)
	}
	if a, err := s.Deployment("long").Agent(t.Context(), agentID(1)); err != nil || a == nil {
		t.Errorf("the agent: %v, %v", a, err)
	}
	// The store can be written, and a new keyset is not affected by the restore.
	long = s.Deployment("long")
	if _, err := keysetsAt(t, long, restoredAt, 90*day).Prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := long.PutToken(t.Context(), spireapi.Token{Value: "new"}); err != nil {
		t.Fatal(err)
	}
	text := mustContents(t, s)
	closed(t, s)

	// The next Open does not restore it a second time.
	log.Reset()
	s = at(t, path, restoredAt.Add(day), &log)
	if got := mustContents(t, s); got != text || log.Len() > 0 {
		t.Errorf("opened again:\n%s\nwant\n%s\n%s", got, text, log.String())
	}
	if left, err := s.Deployment("long").Tokens(t.Context()); err != nil || len(left) != 1 {
		t.Errorf("tokens %+v, %v", left, err)
	}
	// A copy of the restored store is restored.
	path = copyOf(t, s)
	doc := load(t, s.Deployment("long"))
	closed(t, s)
	s = at(t, path, restoredAt.Add(2*day), nil)
	defer closed(t, s)
	want := []ledger.Restored{unknownOf(t, before["long"], copied, restoredAt), unknownOf(t, doc, restoredAt.Add(day), restoredAt.Add(2*day))}
	if got := s.Deployment("long").Restored(); len(want[1].X509) != 3 || !reflect.DeepEqual(got, want) {
		t.Errorf("the second time: %+v\nwant %+v", got, want)
	}
	lost := []spireapi.Lost{{From: copied, To: restoredAt}, {From: restoredAt.Add(day), To: restoredAt.Add(2 * day)}}
	if got := s.Lost(); !reflect.DeepEqual(got, lost) {
		t.Errorf("lost times: %v\nwant %v", got, lost)
	}
}

// TestRestoreTwice: sequence numbers after a second restore of the same copy are above
// all those after the first.
func TestRestoreTwice(t *testing.T) {
	t.Parallel()
	s := at(t, newPath(t), start, nil)
	keysetsAt(t, s.Deployment("default"), start, 0)
	data := readFile(t, copyOf(t, s))
	closed(t, s)
	var last uint64
	for n := range 4 {
		path := newPath(t)
		writeFile(t, path, data)
		s := at(t, path, start.Add(time.Duration(n)*time.Second), nil)
		d := s.Deployment("default")
		if got := load(t, d).Sequence; got <= last {
			t.Errorf("restore %d begins with %d, the previous one ended with %d", n, got, last)
		}
		ks := keysetsAt(t, d, start, 0)
		for range 3 {
			if _, err := ks.Prepare(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		last = load(t, d).Sequence
		closed(t, s)
	}
}

// TestRestoreRejectsAClockBeforeTheCopy: otherwise the expiry of what is not known would
// be too early. The file stays a copy, which is restored when the clock is right.
func TestRestoreRejectsAClockBeforeTheCopy(t *testing.T) {
	t.Parallel()
	s := at(t, newPath(t), start, nil)
	keysetsAt(t, s.Deployment("default"), start, 0)
	path := copyOf(t, s)
	doc := load(t, s.Deployment("default"))
	closed(t, s)
	o := options()
	o.Now = func() time.Time { return start.Add(-time.Hour) }
	if s, err := store.Open(path, o); err == nil {
		closed(t, s)
		t.Error("restored")
	} else if want := "it is a copy of 2026-01-02T03:04:05Z, and the clock shows 2026-01-02T02:04:05Z: set the clock of the machine"; !strings.Contains(err.Error(), want) {
		t.Errorf("%v, want %s", err, want)
	}
	later := start.Add(time.Minute)
	s = at(t, path, later, nil)
	defer closed(t, s)
	if got, want := s.Deployment("default").Restored(), []ledger.Restored{unknownOf(t, doc, start, later)}; !reflect.DeepEqual(got, want) {
		t.Errorf("%+v\nwant %+v", got, want)
	}
}

// TestCrashInRestore stops the commit of a restore at every stage: the file is still a
// copy, or a store that records the restore.
func TestCrashInRestore(t *testing.T) {
	t.Parallel()
	s := at(t, newPath(t), start, nil)
	for _, name := range []string{"one", "two"} {
		fill(t, s.Deployment(name))
	}
	path := copyOf(t, s)
	closed(t, s)
	before := readFile(t, path)
	closed(t, at(t, path, start.Add(time.Hour), nil))
	after := readFile(t, path)
	crashed := newPath(t)
	state := func() string {
		t.Helper()
		o := options()
		o.ReadOnly = true
		s, err := store.Open(crashed, o)
		if err != nil {
			t.Fatal(err)
		}
		defer closed(t, s)
		text := mustContents(t, s)
		for _, name := range []string{"one", "two"} {
			left, err := s.Deployment(name).Tokens(t.Context())
			text += fmt.Sprintln(len(left), err)
		}
		return text
	}
	sum := func(data []byte) string {
		t.Helper()
		writeFile(t, crashed, data)
		return state()
	}
	asCopy, asStore := sum(before), sum(after)
	if asCopy == asStore || !strings.Contains(asCopy, "1 <nil>") || strings.Contains(asStore, "1 <nil>") {
		t.Fatalf("%s\n%s", asCopy, asStore)
	}
	header := 0
	if bytes.Equal(before[:pageSize], after[:pageSize]) {
		header = pageSize
	}
	random := rand.New(rand.NewPCG(7, 8))
	for n := range 12 {
		torn := append(bytes.Clone(before), make([]byte, max(0, len(after)-len(before)))...)
		for page := 2 * pageSize; page < len(after); page += pageSize {
			if n == 0 || random.IntN(2) == 0 {
				copy(torn[page:page+pageSize], after[page:])
			}
		}
		if got := sum(torn); got != asCopy {
			t.Errorf("some pages: %s\nwant %s", got, asCopy)
		}
		// The next Open restores it.
		closed(t, at(t, crashed, start.Add(time.Hour), nil))
		if got := state(); got != asStore {
			t.Errorf("afterwards: %s\nwant %s", got, asStore)
		}
		if n == 0 {
			copy(torn[header:header+pageSize], after[header:])
			if got := sum(torn); got != asStore {
				t.Errorf("with the header: %s\nwant %s", got, asStore)
			}
		}
	}
}

// TestRestoreFails: on a full disk the file stays a copy.
func TestRestoreFails(t *testing.T) {
	t.Parallel()
	dir, _ := tmpfs(t, "size=600k")
	s := open(t, newPath(t))
	fill(t, s.Deployment("default"))
	path := dir + "/server.db"
	writeFile(t, path, readFile(t, copyOf(t, s)))
	closed(t, s)
	fillUp(t, dir+"/ballast")
	if s, err := store.Open(path, options()); !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "restore it from a copy") {
		t.Errorf("%v, %v", s, err)
	}
	if c, err := store.Inspect(t.Context(), path, options()); err != nil || c.CopiedAt.IsZero() {
		t.Errorf("%+v, %v", c, err)
	}
	if err := os.Remove(dir + "/ballast"); err != nil {
		t.Fatal(err)
	}
	s = open(t, path)
	if s.Deployment("default").Restored() == nil {
		t.Error("the restore is not recorded")
	}
	closed(t, s)
}
