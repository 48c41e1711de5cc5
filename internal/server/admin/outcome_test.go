package admin_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/operator/renewd"
	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/internal/refusal"
	"github.com/renewd/renewd/internal/server/admin"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/memory"
)

// hang waits until ctx is done.
func hang(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

// TestSecondMutation: while a mutation is in flight, others of the same deployment fail at
// once, and no other call waits.
func TestSecondMutation(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "east", "west")
		r := w.serveTLS(t)
		c := r.as(t, w, boss)
		east, d := c.Backend("", "east"), w.deployments["east"]
		old := d.tainted(t)
		next, err := d.keysets.Prepare(t.Context())
		check(t, err)
		release := make(chan struct{})
		d.storage.hooks(func(context.Context) error { <-release; return nil }, nil)
		first := make(chan error, 1)
		go func() {
			_, err := east.Prepare(t.Context())
			first <- err
		}()
		synctest.Wait()
		begin := time.Now()
		other := r.as(t, w, boss)
		_, prepare := other.Backend("", "east").Prepare(t.Context())
		for name, err := range map[string]error{
			"prepare": prepare, "activate": east.Activate(t.Context(), next.ID), "taint": east.Taint(t.Context(), next.ID),
			"remove": east.Remove(t.Context(), old.ID, true), "automatic": d.keysets.Taint(t.Context(), next.ID),
		} {
			if want := "The request failed due to an internal error, please try again."; err == nil || err.Error() != want {
				t.Errorf("%s: %v, want %s", name, err, want)
			}
		}
		if _, err := c.TaintKeyset(t.Context(), &api.TaintKeysetRequest{Scope: &api.Scope{Deployment: "east"}, KeysetId: next.ID}); status.Code(err) != codes.Aborted {
			t.Errorf("got %v", err)
		}
		if s, err := east.Status(t.Context()); err != nil || len(s.Keysets) != 3 {
			t.Errorf("status: %+v, %v", s, err)
		}
		if _, err := c.Backend("", "west").Prepare(t.Context()); err != nil {
			t.Errorf("another deployment: %v", err)
		}
		if took := time.Since(begin); took > 0 {
			t.Errorf("the calls took %v", took)
		}
		close(release)
		check(t, <-first)
		if n := len(d.states(t)); n != 4 {
			t.Errorf("%d keysets", n)
		}
	})
}

// TestRaceAgainstAutomatic: the loser of a race for storage changes nothing.
func TestRaceAgainstAutomatic(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, w *world, r *remote, c *renewd.Client) {
		d := w.only()
		d.storage.hooks(func(ctx context.Context) error {
			d.storage.hooks(nil, nil)
			// Another process with the same storage.
			other, err := keyset.Open(ctx, keyset.Config{TrustDomain: td, Storage: d.storage})
			if err == nil {
				_, err = other.Prepare(keyset.WithActor(ctx, "scheduler"))
			}
			return err
		}, nil)
		_, err := c.Backend("", "").Prepare(t.Context())
		if err == nil || err.Error() != refusal.ErrBusy.Error() {
			t.Errorf("got %v", err)
		}
		if n := len(d.states(t)); n != 2 {
			t.Errorf("%d keysets", n)
		}
	})
}

// lost are the ways in which an operator does not learn the outcome.
var lost = map[string]func(t *testing.T, r *remote, c *renewd.Client, cancel func()){
	"timeout":         func(*testing.T, *remote, *renewd.Client, func()) {},
	"connection lost": func(_ *testing.T, _ *remote, c *renewd.Client, _ func()) { c.Close() },
	"interrupted":     func(_ *testing.T, _ *remote, _ *renewd.Client, cancel func()) { cancel() },
	"server ends": func(t *testing.T, r *remote, _ *renewd.Client, _ func()) {
		begin := time.Now()
		check(t, r.stop())
		if took := time.Since(begin); took > 3*time.Second {
			t.Errorf("the end took %v", took)
		}
	},
}

// TestOutcomeUnknown loses the answer to every step, before and after the change is stored.
// The operator gets an unknown outcome. State and audit log agree with storage, and the next
// step works.
func TestOutcomeUnknown(t *testing.T) {
	t.Parallel()
	for name, lose := range lost {
		for _, stored := range []bool{false, true} {
			for step, n := range map[string]int{"prepare": 4, "activate": 3, "taint": 3, "remove": 2} {
				when := map[bool]string{false: "before", true: "after"}[stored]
				t.Run(name+"/"+when+"/"+step, func(t *testing.T) {
					t.Parallel()
					bubble(t, func(t *testing.T, w *world, r *remote, c *renewd.Client) {
						d, b := w.only(), c.Backend("", "")
						old := d.tainted(t).ID
						next, err := d.keysets.Prepare(t.Context())
						check(t, err)
						records := len(d.storage.records())
						before := d.states(t)
						if stored {
							d.storage.hooks(nil, hang)
						} else {
							d.storage.hooks(hang, nil)
						}
						ctx, cancel := context.WithCancel(t.Context())
						defer cancel()
						begin, answer := time.Now(), make(chan error, 1)
						go func() {
							switch step {
							case "prepare":
								_, err := b.Prepare(ctx)
								answer <- err
							case "activate":
								answer <- b.Activate(ctx, next.ID)
							case "taint":
								answer <- b.Taint(ctx, next.ID)
							case "remove":
								answer <- b.Remove(ctx, old, true)
							}
						}()
						synctest.Wait() // it is in storage now
						lose(t, r, c, cancel)
						err = <-answer
						if !errors.Is(err, runbook.ErrOutcomeUnknown) {
							t.Errorf("got %v", err)
						}
						if took := time.Since(begin); name == "timeout" && took != 2*time.Minute {
							t.Errorf("the answer took %v", took)
						}
						synctest.Wait()

						// The list shows the outcome.
						status, err := w.serveTLS(t).as(t, w, viewer).Backend("", "").Status(t.Context())
						check(t, err)
						var after []string
						for _, k := range status.Keysets {
							after = append(after, k.ID+" "+strings.ToUpper(string(k.State)))
						}
						records2 := len(d.storage.records())
						changed := !slices.Equal(before, after)
						if changed != stored || records2-records != map[bool]int{true: 1}[stored] || (stored && len(after) != n) {
							t.Errorf("before %v\nafter  %v, %d records", before, after, records2-records)
						}
						if log := w.log.lines(t, "operator change"); len(log) != 1 || log[0]["level"] != "WARN" {
							t.Errorf("log: %v", log)
						}
						d.storage.hooks(nil, nil)
						if _, err := d.keysets.Prepare(t.Context()); err != nil {
							t.Errorf("the next step: %v", err)
						}
					})
				})
			}
		}
	}
}

// TestConnectionAges: a step in flight completes although its connection reaches its maximum
// age.
func TestConnectionAges(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, w *world, _ *remote, c *renewd.Client) {
		b := c.Backend("", "")
		_, err := b.Status(t.Context())
		check(t, err)
		time.Sleep(160 * time.Second)
		w.only().storage.hooks(func(context.Context) error { time.Sleep(115 * time.Second); return nil }, nil)
		if _, err := b.Prepare(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// TestOtherCallsTimeOut: calls that are not about keysets are limited in time, too.
func TestOtherCallsTimeOut(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := w.only()
		var err error
		d.server, err = spireapi.New(spireapi.Config{TrustDomain: td, Keysets: d.keysets, Storage: hangingStorage{d.kept}, Ledger: d.ledger})
		check(t, err)
		rules, err := admin.ParseRules(td, []string{boss.String()}, nil)
		check(t, err)
		w.Service, err = admin.New(admin.Config{
			TrustDomain: td, Rules: rules, Published: w.published, Certificate: d.certificate,
			Deployments: []admin.Deployment{{Name: "default", Keysets: d.keysets, Server: d.server, Ledger: d.ledger}},
		})
		check(t, err)
		c := w.serveTLS(t).as(t, w, boss)
		begin := time.Now()
		_, err = c.CreateJoinToken(t.Context(), &api.CreateJoinTokenRequest{})
		if took := time.Since(begin); status.Code(err) != codes.DeadlineExceeded || took != 2*time.Minute {
			t.Errorf("after %v: %v", took, err)
		}
	})
}

// hangingStorage is a server's storage that hangs when a token is stored.
type hangingStorage struct{ *memory.Server }

func (hangingStorage) PutToken(ctx context.Context, _ spireapi.Token, _ ...*spireapi.AuditRecord) error {
	return hang(ctx)
}

// TestLedgerCleanupWithoutCaller: after a removal the ledger's rows are deleted, also if the
// caller has disconnected.
func TestLedgerCleanupWithoutCaller(t *testing.T) {
	t.Parallel()
	// Whether the ledger sees a context that is done is random.
	for range 8 {
		bubble(t, ledgerCleanupWithoutCaller)
	}
}

func ledgerCleanupWithoutCaller(t *testing.T, w *world, _ *remote, c *renewd.Client) {
	d := w.only()
	old := d.tainted(t)
	ctx, cancel := context.WithCancel(t.Context())
	d.storage.hooks(nil, func(served context.Context) error {
		cancel()
		<-served.Done() // the server has noticed
		return nil
	})
	if err := c.Backend("", "").Remove(ctx, old.ID, true); !errors.Is(err, runbook.ErrOutcomeUnknown) {
		t.Errorf("got %v", err)
	}
	synctest.Wait()
	if got := d.states(t); len(got) != 1 || d.rows.count() != 0 {
		t.Errorf("keysets %v, %d rows", got, d.rows.count())
	}
	if log := w.log.lines(t, "ledger rows"); len(log) != 0 {
		t.Errorf("log: %v", log)
	}
}

// TestStorageFails: the operator gets the error of storage, with an unknown outcome.
func TestStorageFails(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, w *world, r *remote, c *renewd.Client) {
		d := w.only()
		full := errors.New("no space left on device")
		d.storage.hooks(func(context.Context) error { return full }, nil)
		_, err := c.Backend("", "").Prepare(t.Context())
		if want := "the outcome is not known: prepare keyset: save: no space left on device"; err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
		if n := len(d.states(t)); n != 1 {
			t.Errorf("%d keysets", n)
		}
	})
}
