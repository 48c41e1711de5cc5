// Package rpc ends gRPC calls at their deadline even if storage hangs; see package
// detach.
package rpc

import (
	"context"
	"errors"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/server/detach"
)

// Unary returns an interceptor that ends a call when its context is done. The handler
// may still be running then; g owns it.
func Unary(g *detach.Group) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		resp, err := detach.Do(ctx, g, func() (any, error) { return handler(ctx, req) })
		return resp, ended(ctx, err)
	}
}

// Stream is [Unary] for streams. After the end of the call, the handler's sends and
// receives fail.
func Stream(g *detach.Group) grpc.StreamServerInterceptor {
	return func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		s := &leaving{ServerStream: stream}
		_, err := detach.Do(stream.Context(), g, func() (struct{}, error) { return struct{}{}, handler(srv, s) })
		s.leave()
		return ended(stream.Context(), err)
	}
}

// ended returns the error of a call. If the call was canceled with a status, that is it,
// whatever the handler made of the canceled context.
func ended(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); err != nil && cause != nil {
		if _, ok := status.FromError(cause); ok {
			return cause
		}
	}
	return Error(err)
}

// Error converts an error of package detach to a status. Other errors are returned
// unchanged.
func Error(err error) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	switch {
	case errors.Is(err, detach.ErrStuck):
		return status.Error(codes.Unavailable, err.Error())
	case errors.Is(err, detach.ErrOpen):
		return status.Error(status.FromContextError(err).Code(), err.Error())
	}
	return err
}

// leaving is a stream that rejects all use after its end: gRPC does not allow it.
type leaving struct {
	grpc.ServerStream
	mu   sync.RWMutex // read-locked by each use of the stream, which ends with its context
	left bool
}

func (l *leaving) leave() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.left = true
}

func (l *leaving) use(fn func(any) error, m any) error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.left {
		return status.FromContextError(l.Context().Err()).Err()
	}
	return fn(m)
}

// SendMsg implements grpc.ServerStream.
func (l *leaving) SendMsg(m any) error { return l.use(l.ServerStream.SendMsg, m) }

// RecvMsg implements grpc.ServerStream.
func (l *leaving) RecvMsg(m any) error { return l.use(l.ServerStream.RecvMsg, m) }
