package keyset_test

import (
	"errors"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/test/memory"
)

// TestSuccessorOfAClockAhead prepares a keyset while the clock is far ahead. Its CA
// certificate is valid when the clock is right again.
func TestSuccessorOfAClockAhead(t *testing.T) {
	t.Parallel()
	c := &clock{start}
	d := open(t, keyset.Config{Now: c.Now})
	first := d.Active()
	c.now = start.Add(91 * 24 * time.Hour)
	k, err := d.Prepare(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Activate(t.Context(), k.ID); err != nil {
		t.Fatal(err)
	}
	c.now = start.Add(time.Second)
	svid, err := d.SignX509(workload, newKey(t).Public(), 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range d.Bundle().X509 {
		if a.ID != svid.Authority {
			continue
		}
		if begins := a.Certificate.NotBefore; !begins.Equal(k.ValidFrom) || !begins.Equal(first.ValidFrom) || begins.After(c.now) {
			t.Errorf("the CA certificate begins %v, keyset %v, its predecessor %v; it is %v", begins, k.ValidFrom, first.ValidFrom, c.now)
		}
	}
	// If the clock was ahead for the predecessor, the certificate begins with its own issue.
	if k, err = d.Prepare(t.Context()); err != nil || k.ValidFrom.After(c.now) || c.now.Sub(k.ValidFrom) > time.Minute {
		t.Errorf("valid from %v, issued %v, %v", k.ValidFrom, k.IssuedAt, err)
	}
}

// TestActivateRefusesTheFuture: a keyset that was issued by a clock that was ahead
// cannot be activated before that time.
func TestActivateRefusesTheFuture(t *testing.T) {
	t.Parallel()
	c := &clock{start.Add(48 * time.Hour)}
	store := new(memory.Keysets)
	d := open(t, keyset.Config{Now: c.Now, Storage: store})
	k, err := d.Prepare(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []time.Duration{0, 47 * time.Hour, 48*time.Hour - 11*time.Second} {
		c.now = start.Truncate(time.Second).Add(at)
		if err := d.Activate(t.Context(), k.ID); !errors.Is(err, keyset.ErrActivateEarly) || d.Active().ID == k.ID {
			t.Errorf("after %v: %v, active is %s", at, err, d.Active().ID)
		}
	}
	c.now = k.IssuedAt.Add(-time.Second) // within the tolerance
	if err := d.Activate(t.Context(), k.ID); err != nil {
		t.Error(err)
	}
}
