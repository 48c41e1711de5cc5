package admin_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/api"
)

// received returns a backup as a client receives it.
func received(ctx context.Context, conn grpc.ClientConnInterface) (data []byte, err error) {
	stream, err := api.NewOperatorClient(conn).Backup(ctx, &api.BackupRequest{})
	if err != nil {
		return nil, err
	}
	for size := int64(0); ; {
		part, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF) && size != int64(len(data)):
			return data, fmt.Errorf("%d bytes, size %d", len(data), size)
		case errors.Is(err, io.EOF):
			return data, nil
		case err != nil:
			return data, err
		case size != 0:
			return data, errors.New("something after the last part")
		}
		data, size = append(data, part.GetData()...), part.GetSize()
	}
}

// TestBackup: the copy arrives, and the log names the actor.
func TestBackup(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		want := bytes.Repeat([]byte("0123456789abcdef"), 100_000)
		w.copied = func(_ context.Context, to io.Writer) (int64, error) {
			buf := make([]byte, 256<<10) // reused for each part
			return io.CopyBuffer(to, struct{ io.Reader }{bytes.NewReader(want)}, buf)
		}
		r := w.serveTLS(t)
		conn := r.dial(t, w, w.only().sign(t, boss, time.Hour))
		if got, err := received(t.Context(), conn); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		log := w.log.lines(t, "operator backup")
		if len(log) != 1 || log[0]["level"] != "INFO" || log[0]["actor"] != boss.String() || log[0]["operation"] != "Backup" ||
			log[0]["bytes"] != float64(len(want)) || log[0]["outcome"] != "OK" {
			t.Errorf("log: %v", log)
		}
		// A backup that fails in the middle has no size.
		w.copied = func(_ context.Context, to io.Writer) (int64, error) {
			_, err := to.Write(want[:1000])
			return 0, errors.Join(err, errors.New("no space left on device"))
		}
		got, err := received(t.Context(), conn)
		if len(got) != 1000 || status.Code(err) != codes.Internal || status.Convert(err).Message() != "no space left on device" {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		log = w.log.lines(t, "operator backup")
		if len(log) != 1 || log[0]["level"] != "WARN" || log[0]["bytes"] != 1000.0 || log[0]["outcome"] != "Internal" || log[0]["error"] != "no space left on device" {
			t.Errorf("log: %v", log)
		}
	})
}

// TestBackupClientHangs: the server sends a client that does not read no more than the
// connection's buffers hold, and gives up after two minutes. It gives up at once if the
// client disconnects or serving ends.
func TestBackupClientHangs(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		then func(r *remote, cancel func())
		took time.Duration
		code codes.Code // OK: any other
	}{
		"hangs":       {func(*remote, func()) {}, 2 * time.Minute, codes.DeadlineExceeded},
		"goes":        {func(_ *remote, cancel func()) { cancel() }, 0, codes.Canceled},
		"server ends": {func(r *remote, _ func()) { _ = r.stop() }, 2 * time.Second, codes.OK},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				ended := make(chan error, 1)
				written := 0
				w.copied = func(_ context.Context, to io.Writer) (int64, error) {
					for {
						n, err := to.Write(make([]byte, 256<<10))
						if written += n; err != nil {
							ended <- err
							return 0, fmt.Errorf("copy the store: %w", err)
						}
					}
				}
				r := w.serveTLS(t)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				begin := time.Now()
				_, err := r.as(t, w, boss).Backup(ctx, &api.BackupRequest{})
				check(t, err)
				synctest.Wait()
				c.then(r, cancel)
				<-ended
				if took := time.Since(begin); took != c.took {
					t.Errorf("given up on after %v", took)
				}
				synctest.Wait()
				if written > 1<<20 {
					t.Errorf("the server holds %d bytes", written)
				}
				if log := w.log.lines(t, "operator backup"); len(log) != 1 || log[0]["level"] != "WARN" || c.code != codes.OK && log[0]["outcome"] != c.code.String() {
					t.Errorf("log: %v", log)
				}
			})
		})
	}
}
