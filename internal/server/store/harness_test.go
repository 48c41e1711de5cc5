package store_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/seal"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/internal/server/store"
)

var (
	td    = spiffeid.RequireTrustDomainFromString("example.org")
	start = time.Date(2026, 1, 2, 3, 4, 5, 678, time.UTC)
	key   = seal.Ephemeral()
)

func options() store.Options { return store.Options{TrustDomain: td, Seal: key} }

func newPath(t testing.TB) string {
	t.Helper()
	return filepath.Join(t.TempDir(), "server.db")
}

func open(t testing.TB, path string) *store.Store {
	t.Helper()
	s, err := store.Open(path, options())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// opened opens a store and closes it at the end of the test.
func opened(t testing.TB, path string) *store.Store {
	t.Helper()
	s := open(t, path)
	t.Cleanup(func() { closed(t, s) })
	return s
}

func closed(t testing.TB, s *store.Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// fresh returns a deployment of a new store.
func fresh(t testing.TB) *store.Deployment {
	t.Helper()
	return opened(t, newPath(t)).Deployment("default")
}

func agentID(n int) spiffeid.ID { return spiffeid.RequireFromPathf(td, "/spire/agent/%d", n) }

func entryID(n int) string { return fmt.Sprintf("entry-%06d", n) }

// update stores an agent with a version.
func update(ctx context.Context, d spireapi.Storage, n int, version string) error {
	_, err := d.UpdateAgent(ctx, agentID(n), func(*spireapi.Agent) (*spireapi.Agent, error) {
		return &spireapi.Agent{ID: agentID(n), Version: version}, nil
	})
	return err
}

// fill writes something of each kind.
func fill(t testing.TB, d *store.Deployment) {
	t.Helper()
	ctx := t.Context()
	ks, err := keyset.Open(ctx, keyset.Config{TrustDomain: td, Storage: d})
	if err == nil {
		_, err = ks.Prepare(ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
	change := ledger.Change{JWT: map[string]time.Time{"kid": start}}
	var batch []spireapi.StoredEntry
	for n := range 100 {
		stored := spireapi.StoredEntry{Entry: spireapi.Entry{ID: entryID(n), SPIFFEID: spiffeid.RequireFromPathf(td, "/w/%d", n)}, Revision: int64(n)}
		if batch = append(batch, stored); n%10 == 9 {
			if err := d.PutEntries(ctx, batch, nil); err != nil {
				t.Fatal(err)
			}
			batch = nil
		}
		change.Put = append(change.Put, ledger.Row{Authority: rand.Text(), Agent: agentID(n % 7).String(), Entry: entryID(n), NotAfter: start})
	}
	for n := range 20 {
		if err := update(ctx, d, n, "1.0"); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range []error{d.SaveLedger(ctx, change), d.PutToken(ctx, spireapi.Token{Value: "token", ExpiresAt: start})} {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// contents returns everything in a store as text.
func contents(s *store.Store) (text string, err error) {
	ctx := context.Background()
	names, err := s.Deployments(ctx)
	var out strings.Builder
	fmt.Fprintln(&out, names)
	for _, name := range names {
		d := s.Deployment(name)
		add := func(v any, e error) {
			fmt.Fprintf(&out, "%s: %+v\n", name, v)
			if err == nil {
				err = e
			}
		}
		doc, e := d.Load(ctx)
		add(doc, e)
		records, e := d.Audit(ctx, 0, 0)
		add(records, e)
		agents, e := d.Agents(ctx)
		add(agents, e)
		entries, e := d.Entries(ctx)
		add(entries, e)
		jwt, e := d.LoadLedger(ctx, func(r ledger.Row) { fmt.Fprintln(&out, r) })
		add(jwt, e)
		add(d.Restored(), nil)
	}
	federated, e := s.Federated(ctx)
	fmt.Fprintf(&out, "%+v\n", federated)
	return out.String(), errors.Join(err, e)
}

func mustContents(t testing.TB, s *store.Store) string {
	t.Helper()
	text, err := contents(s)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// writeFile overwrites a file in place. Truncating it first is slower, because some file
// systems then flush it when it is closed.
func writeFile(t testing.TB, path string, data []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(data, 0)
	if err := errors.Join(err, f.Truncate(int64(len(data))), f.Close()); err != nil {
		t.Fatal(err)
	}
}
