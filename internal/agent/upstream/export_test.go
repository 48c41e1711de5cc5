package upstream

import (
	"context"
	"net"
	"net/url"
)

// ThroughProxy is the dialer of a Client with this proxy.
func ThroughProxy(proxy *url.URL) func(context.Context, string) (net.Conn, error) {
	return dialerThrough(proxy, dialTCP)
}
