package server

import (
	"net"
	"net/netip"
	"testing"
	"time"
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
	l := newLimits(nobody{}, nil)
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
		if n := len(l.young) + len(l.old); n != maxClients {
			t.Fatalf("round %d: %d clients are kept, want %d", round, n, maxClients)
		}
		now = now.Add(generation)
	}
	// There is room again when they have gone.
	l.find(address(0), now.Add(generation))
	if c := l.find(address(2*maxClients-1), now.Add(2*generation)); c == &l.strangers {
		t.Error("a new client has no place though the others are gone")
	}
	if n := len(l.young) + len(l.old); n != 2 {
		t.Errorf("%d clients are kept, want 2", n)
	}
}

// TestForgettingGivesNothing forgets a client as early as that can happen: by
// then all its calls have had their turn, and its budgets are full.
func TestForgettingGivesNothing(t *testing.T) {
	t.Parallel()
	l := newLimits(nobody{}, nil)
	begin := l.born
	last := begin.Add(generation - 1) // the last moment of a generation
	c := l.find(address(1), last)
	next := last
	for l.find(address(2), next); ; next = next.Add(time.Second) {
		l.find(address(2), next)
		_, young := l.young[address(1)]
		_, old := l.old[address(1)]
		if !young && !old {
			break
		}
	}
	if kept := next.Sub(last); kept < generation || kept < maxPatience+2*time.Second || kept > 2*generation {
		t.Errorf("forgotten after %v", kept)
	}
	if l.find(address(1), next) == c {
		t.Error("not forgotten")
	}
}

func TestWhoIsLimited(t *testing.T) {
	t.Parallel()
	for want, address := range map[string]net.Addr{
		"invalid Prefix":     &net.UnixAddr{Name: "/run/socket", Net: "unix"},
		"10.1.2.3/32":        &net.TCPAddr{IP: net.ParseIP("10.1.2.3"), Port: 1},
		"2001:db8:1:2::/64":  &net.TCPAddr{IP: net.ParseIP("2001:db8:1:2:3:4:5:6"), Port: 1},
		"fe80::/64":          &net.TCPAddr{IP: net.ParseIP("fe80::1"), Zone: "eth0"},
		"2001:db8:1:ff::/64": &net.TCPAddr{IP: net.ParseIP("2001:db8:1:ff::")},
	} {
		if got := clientOf(address).String(); got != want {
			t.Errorf("%v is %s, want %s", address, got, want)
		}
	}
	for _, nobody := range []net.Addr{nil, &net.TCPAddr{}, &net.UDPAddr{IP: net.IPv4(10, 0, 0, 1)}} {
		if got := clientOf(nobody); got.IsValid() {
			t.Errorf("%v is %s", nobody, got)
		}
	}
}
