package listen

import (
	"context"
	"errors"
	"net"
	"net/http"
	"time"
)

// httpDrainTime is how long requests in flight may take when [ServeHTTP] ends.
const httpDrainTime = 3 * time.Second

// ServeHTTP serves an HTTP server on lis, which it closes, within the limits of [HTTP]
// and of the pool, until ctx ends or lis fails. serve is its Serve or ServeTLS. When
// ctx ends, requests in flight have three seconds to finish, and ServeHTTP returns nil.
func ServeHTTP(ctx context.Context, p *Pool, lis net.Listener, srv *http.Server, serve func(net.Listener) error) error {
	limited := p.Listen(lis, ForAll(HTTP), nil)
	defer limited.Close() // serve may fail before it uses it
	srv.ConnState = limited.ConnState
	done := make(chan error, 1)
	go func() { done <- serve(limited) }()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), httpDrainTime)
		defer cancel()
		if srv.Shutdown(stop) != nil {
			_ = srv.Close() // ends the remaining requests; Shutdown has closed the listener
		}
		err = <-done
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}
