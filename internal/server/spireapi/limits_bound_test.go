package spireapi

import (
	"net/netip"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/listen"
)

// Bounds of memory need more clients than a test has connections for, so these
// tests look inside.

// address is the i-th of many clients.
func address(i int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 32)
}

// TestClientsAreBounded has more clients come than are told apart.
func TestClientsAreBounded(t *testing.T) {
	t.Parallel()
	l := newLimits(nobody{}, listen.NewLines(nil))
	now := l.born
	known := l.find(address(0), now)
	for round := range 4 {
		for i := range 2 * maxClients {
			if round > 0 { // new ones first
				i = 2*maxClients - 1 - i
			}
			c := l.find(address(i), now)
			switch {
			case i == 0 && c != known:
				t.Fatalf("round %d: a client that is known was forgotten", round)
			case i == 2*maxClients-1 && c != &l.strangers:
				t.Fatalf("round %d: client %d is told apart", round, i)
			}
		}
		if n := len(l.young.clients) + len(l.old.clients); n != maxClients {
			t.Fatalf("round %d: %d clients are kept, want %d", round, n, maxClients)
		}
		now = now.Add(generationTime)
	}
	// There is room again when they have gone.
	l.find(address(0), now.Add(generationTime))
	if c := l.find(address(2*maxClients-1), now.Add(2*generationTime)); c == &l.strangers {
		t.Error("a new client has no place though the others are gone")
	}
	if n := len(l.young.clients) + len(l.old.clients); n != 2 {
		t.Errorf("%d clients are kept, want 2", n)
	}
}

// TestForgettingGivesNothing forgets a client as early as that can happen: by
// then all its calls have had their turn, and its budgets are full.
func TestForgettingGivesNothing(t *testing.T) {
	t.Parallel()
	l := newLimits(nobody{}, listen.NewLines(nil))
	begin := l.born
	last := begin.Add(generationTime - 1) // the last moment of a generation
	c := l.find(address(1), last)
	next := last
	for l.find(address(2), next); ; next = next.Add(time.Second) {
		l.find(address(2), next)
		_, young := l.young.clients[address(1)]
		_, old := l.old.clients[address(1)]
		if !young && !old {
			break
		}
	}
	if kept := next.Sub(last); kept < generationTime || kept < maxPatience+2*time.Second || kept > 2*generationTime {
		t.Errorf("forgotten after %v", kept)
	}
	if l.find(address(1), next) == c {
		t.Error("not forgotten")
	}
}

// TestOneSiteIsBounded has all /64s of one /48 come, as one customer of a provider
// can. Others are still told apart, and who is known in that /48 stays so.
func TestOneSiteIsBounded(t *testing.T) {
	t.Parallel()
	l := newLimits(nobody{}, listen.NewLines(nil))
	now := l.born
	network := func(site, i int) netip.Prefix {
		return netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, byte(site >> 8), byte(site), byte(i >> 8), byte(i)}), 64)
	}
	neighbor := l.find(network(1, 0), now)
	for range 3 {
		for i := range 1 << 16 {
			if i == 0 {
				continue
			}
			if c := l.find(network(1, i), now); c == &l.strangers || c == neighbor {
				t.Fatalf("network %d of the site shares what others have", i)
			}
		}
		site := listen.Site(network(1, 0))
		if n := l.young.of[site] + l.old.of[site]; n > maxOfSite+1 {
			t.Fatalf("%d clients are kept for one site", n)
		}
		if c := l.find(network(1, 0), now); c != neighbor {
			t.Fatal("a client of the site that was known is not told apart any more")
		}
		seen := make(map[*client]bool)
		for i := range 1000 {
			seen[l.find(network(2+i, 0), now)], seen[l.find(address(i), now)] = true, true
		}
		if len(seen) != 2000 || seen[&l.strangers] {
			t.Fatalf("%d clients elsewhere are told apart, want 2000", len(seen))
		}
		now = now.Add(generationTime)
	}
	// There is room for others of the site when those have gone.
	now = now.Add(generationTime)
	l.find(address(0), now)
	if l.find(network(1, 1), now) == l.find(network(1, 2), now) {
		t.Error("two of the site are not told apart though the others are gone")
	}
}
