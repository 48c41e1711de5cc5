package spireapi

import (
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/listen"
)

// The bounds of memory need more clients than a test has connections for, so these
// tests are in the package.

// address returns the i-th of many clients.
func address(i int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 32)
}

// TestClientsAreBounded: more clients come than are distinguished.
func TestClientsAreBounded(t *testing.T) {
	t.Parallel()
	l := newLimits(noopObserver{}, listen.NewLog(slog.New(slog.DiscardHandler)))
	now := l.createdAt
	known := l.findLocked(address(0), now)
	for round := range 4 {
		for i := range 2 * maxClients {
			if round > 0 { // new ones first
				i = 2*maxClients - 1 - i
			}
			c := l.findLocked(address(i), now)
			switch {
			case i == 0 && c != known:
				t.Fatalf("round %d: an active client was evicted", round)
			case i == 2*maxClients-1 && c != &l.overflow:
				t.Fatalf("round %d: client %d is distinguished", round, i)
			}
		}
		if n := len(l.young.clients) + len(l.old.clients); n != maxClients {
			t.Fatalf("round %d: %d clients are kept, want %d", round, n, maxClients)
		}
		now = now.Add(generationTime)
	}
	// There is room again when they are evicted.
	l.findLocked(address(0), now.Add(generationTime))
	if c := l.findLocked(address(2*maxClients-1), now.Add(2*generationTime)); c == &l.overflow {
		t.Error("a new client has no place although the others are evicted")
	}
	if n := len(l.young.clients) + len(l.old.clients); n != 2 {
		t.Errorf("%d clients are kept, want 2", n)
	}
}

// TestEvictionGainsNothing evicts a client as early as possible: by then none of its
// calls waits, and its budgets are full.
func TestEvictionGainsNothing(t *testing.T) {
	t.Parallel()
	l := newLimits(noopObserver{}, listen.NewLog(slog.New(slog.DiscardHandler)))
	begin := l.createdAt
	last := begin.Add(generationTime - 1) // the last moment of a generation
	c := l.findLocked(address(1), last)
	next := last
	for l.findLocked(address(2), next); ; next = next.Add(time.Second) {
		l.findLocked(address(2), next)
		_, young := l.young.clients[address(1)]
		_, old := l.old.clients[address(1)]
		if !young && !old {
			break
		}
	}
	if kept := next.Sub(last); kept < generationTime || kept < maxWait+2*time.Second || kept > 2*generationTime {
		t.Errorf("evicted after %v", kept)
	}
	if l.findLocked(address(1), next) == c {
		t.Error("not evicted")
	}
}

// TestOneSiteIsBounded: calls come from all /64s of one /48, as one customer of a
// provider can make them. Other clients are still distinguished, and a client that
// is known in that /48 stays so.
func TestOneSiteIsBounded(t *testing.T) {
	t.Parallel()
	l := newLimits(noopObserver{}, listen.NewLog(slog.New(slog.DiscardHandler)))
	now := l.createdAt
	network := func(site, i int) netip.Prefix {
		return netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, byte(site >> 8), byte(site), byte(i >> 8), byte(i)}), 64)
	}
	neighbor := l.findLocked(network(1, 0), now)
	for range 3 {
		for i := range 1 << 16 {
			if i == 0 {
				continue
			}
			if c := l.findLocked(network(1, i), now); c == &l.overflow || c == neighbor {
				t.Fatalf("network %d of the site shares the budget of others", i)
			}
		}
		site := listen.Site(network(1, 0))
		if n := l.young.perSite[site] + l.old.perSite[site]; n > maxPerSite+1 {
			t.Fatalf("%d clients are kept for one site", n)
		}
		if c := l.findLocked(network(1, 0), now); c != neighbor {
			t.Fatal("a client of the site that was known is no longer distinguished")
		}
		seen := make(map[*client]bool)
		for i := range 1000 {
			seen[l.findLocked(network(2+i, 0), now)], seen[l.findLocked(address(i), now)] = true, true
		}
		if len(seen) != 2000 || seen[&l.overflow] {
			t.Fatalf("%d clients elsewhere are distinguished, want 2000", len(seen))
		}
		now = now.Add(generationTime)
	}
	// There is room for others of the site when those are evicted.
	now = now.Add(generationTime)
	l.findLocked(address(0), now)
	if l.findLocked(network(1, 1), now) == l.findLocked(network(1, 2), now) {
		t.Error("two of the site are not distinguished although the others are evicted")
	}
}
