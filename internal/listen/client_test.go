package listen_test

import (
	"net"
	"testing"

	"github.com/renewd/renewd/internal/listen"
)

func TestClient(t *testing.T) {
	t.Parallel()
	for want, address := range map[string]net.Addr{
		"invalid Prefix":     &net.UnixAddr{Name: "/run/socket", Net: "unix"},
		"10.1.2.3/32":        &net.TCPAddr{IP: net.ParseIP("10.1.2.3"), Port: 1},
		"2001:db8:1:2::/64":  &net.TCPAddr{IP: net.ParseIP("2001:db8:1:2:3:4:5:6"), Port: 1},
		"fe80::/64":          &net.TCPAddr{IP: net.ParseIP("fe80::1"), Zone: "eth0"},
		"2001:db8:1:ff::/64": &net.TCPAddr{IP: net.ParseIP("2001:db8:1:ff::")},
	} {
		if got := listen.Client(address).String(); got != want {
			t.Errorf("%v is %s, want %s", address, got, want)
		}
	}
	for _, address := range []net.Addr{nil, &net.TCPAddr{}, &net.UDPAddr{IP: net.IPv4(10, 0, 0, 1)}} {
		if got := listen.Client(address); got.IsValid() {
			t.Errorf("%v is %s", address, got)
		}
	}
}

func TestSite(t *testing.T) {
	t.Parallel()
	for want, address := range map[string]string{
		"invalid Prefix": "10.1.2.3", "2001:db8:1::/48": "2001:db8:1:2:3:4:5:6", "2001:db8::/48": "2001:db8::1",
	} {
		if got := listen.Site(listen.Client(&net.TCPAddr{IP: net.ParseIP(address)})).String(); got != want {
			t.Errorf("%s is of %s, want %s", address, got, want)
		}
	}
}
