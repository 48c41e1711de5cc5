package upstream

import (
	"bufio"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"
)

// maxProxyAnswer is the longest answer to CONNECT that is read, in bytes.
const maxProxyAnswer = 64 << 10

// dialer connects to an address.
type dialer func(ctx context.Context, address string) (net.Conn, error)

// dialerThrough returns a dialer that connects through an HTTP proxy (CONNECT: RFC
// 9110, section 9.3.6). The proxy sees the address and the TLS records only.
//
// gRPC's own proxy support does not work with a custom dialer.
func dialerThrough(proxy *url.URL, dial dialer) dialer {
	return func(ctx context.Context, address string) (net.Conn, error) {
		conn, err := dial(ctx, proxy.Host)
		if err != nil {
			return nil, fmt.Errorf("connect to proxy %s: %w", proxy.Host, err)
		}
		if err := connectThrough(ctx, conn, proxy, address); err != nil {
			return nil, errors.Join(fmt.Errorf("connect to %s through proxy %s: %w", address, proxy.Host, err), conn.Close())
		}
		return conn, nil
	}
}

// connectThrough asks the proxy, the peer of conn, to connect to the address.
func connectThrough(ctx context.Context, conn net.Conn, proxy *url.URL, address string) (err error) {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() {
			err = ctx.Err() // the deadline is set, or about to be
		}
	}()
	req := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: address}, Host: address, Header: make(http.Header)}
	if u := proxy.User; u != nil {
		password, _ := u.Password()
		req.Header.Set("Proxy-Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(u.Username()+":"+password)))
	}
	if err := req.Write(conn); err != nil {
		return err
	}
	r := bufio.NewReader(io.LimitReader(conn, maxProxyAnswer))
	resp, err := http.ReadResponse(r, req) //nolint:bodyclose // the body is the connection, which the caller owns
	switch {
	case err != nil:
		return fmt.Errorf("read the answer to CONNECT: %w", err)
	case resp.StatusCode == http.StatusProxyAuthRequired:
		return fmt.Errorf("the proxy answered %q: give user and password in server_proxy, as in http://USER:PASSWORD@HOST:PORT", resp.Status)
	case resp.StatusCode/100 != 2:
		return fmt.Errorf("the proxy answered %q", resp.Status)
	case r.Buffered() > 0:
		// In TLS the client speaks first.
		return errors.New("the proxy answered more than CONNECT asks for")
	}
	return nil
}
