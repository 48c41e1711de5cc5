package figures

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// clientEnv makes this program a client: "kind socket number", and the folders of
// cgroups for the kind "pod".
const clientEnv = "RENEWD_FIGURES_CLIENT"

func runClient(spec string) error {
	f := strings.Fields(spec)
	n, err := strconv.Atoi(f[2])
	if err != nil {
		return err
	}
	switch f[0] {
	case "hold":
		return hold(f[1], n)
	case "watch":
		return watch(f[1])
	case "pod":
		return inPod(f[1], f[3:])
	}
	return ask(f[1], time.Duration(n)*time.Second, f[0] == "kept")
}

func dial(path string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
}

func fetch(ctx context.Context, cc *grpc.ClientConn) (grpc.ServerStreamingClient[workloadpb.X509SVIDResponse], error) {
	ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	return workloadpb.NewSpiffeWorkloadAPIClient(cc).FetchX509SVID(ctx, &workloadpb.X509SVIDRequest{})
}

// once opens a connection, gets one answer and closes it.
func once(ctx context.Context, path string) error {
	cc, err := dial(path)
	if err != nil {
		return err
	}
	defer cc.Close()
	return first(ctx, cc)
}

// clientTimeout is how long a client waits for a daemon, much longer than any measured
// answer takes. A daemon that does not answer must not block the measurement.
const clientTimeout = 3 * time.Minute

func first(ctx context.Context, cc *grpc.ClientConn) error {
	ctx, cancel := context.WithTimeout(ctx, clientTimeout)
	defer cancel()
	stream, err := fetch(ctx, cc)
	if err == nil {
		_, err = stream.Recv()
	}
	if err != nil {
		return fmt.Errorf("first answer on a stream: %w", err)
	}
	return nil
}

// ask runs 64 clients that fetch first answers, and prints the answers a second, without
// the first second.
func ask(path string, length time.Duration, reuse bool) error {
	var done atomic.Bool
	var answers atomic.Int64
	errs := make(chan error, 64)
	var wg sync.WaitGroup
	for range cap(errs) {
		wg.Go(func() {
			var cc *grpc.ClientConn
			var err error
			if reuse {
				if cc, err = dial(path); err != nil {
					errs <- err
					return
				}
				defer cc.Close()
			}
			for !done.Load() {
				if reuse {
					err = first(context.Background(), cc)
				} else {
					err = once(context.Background(), path)
				}
				if err != nil {
					errs <- err
					return
				}
				answers.Add(1)
			}
		})
	}
	time.Sleep(time.Second)
	before, start := answers.Load(), time.Now()
	time.Sleep(length)
	rate := float64(answers.Load()-before) / time.Since(start).Seconds()
	done.Store(true)
	wg.Wait()
	select {
	case err := <-errs:
		return err
	default:
	}
	fmt.Println(rate)
	return nil
}

// hold opens n streams on a connection each and prints "open" when all have
// an answer. At each line it reads, it prints how long after the first stream
// the last one got its next answer, in nanoseconds.
func hold(path string, n int) error {
	answers := make([]chan time.Time, n)
	failed := make(chan error, n)
	for i := range answers {
		answers[i] = make(chan time.Time, 1<<12)
		cc, err := dial(path)
		if err != nil {
			return err
		}
		go func() {
			stream, err := fetch(context.Background(), cc)
			for err == nil {
				_, err = stream.Recv()
				answers[i] <- time.Now()
			}
			failed <- err
		}()
	}
	next := func() (begin, end time.Time, err error) {
		limit := time.After(clientTimeout)
		for i := range answers {
			select {
			case <-limit:
				return begin, end, fmt.Errorf("next answer on stream %d of %d: none within %v", i+1, n, clientTimeout)
			case t := <-answers[i]:
				if begin.IsZero() || t.Before(begin) {
					begin = t
				}
				if t.After(end) {
					end = t
				}
			case err := <-failed:
				return begin, end, err
			}
		}
		return begin, end, nil
	}
	if _, _, err := next(); err != nil {
		return err
	}
	fmt.Println("open")
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		begin, end, err := next()
		if err != nil {
			return err
		}
		fmt.Println(end.Sub(begin).Nanoseconds())
	}
	return nil
}

// watch holds one stream and reopens it when it ends. At the line "ask" it prints whether a
// new caller is answered within five seconds. At any other line it prints the longest time
// without an SVID, in nanoseconds.
func watch(path string) error {
	var mu sync.Mutex
	var lost time.Time // since when
	var longest time.Duration
	answered := make(chan struct{})
	opened := sync.OnceFunc(func() { close(answered) })
	held := func() {
		mu.Lock()
		defer mu.Unlock()
		if !lost.IsZero() {
			longest, lost = max(longest, time.Since(lost)), time.Time{}
		}
		opened()
	}
	go func() {
		cc, err := dial(path)
		for ; err == nil; time.Sleep(50 * time.Millisecond) {
			stream, err := fetch(context.Background(), cc)
			for err == nil {
				if _, err = stream.Recv(); err == nil {
					held()
				}
			}
			mu.Lock()
			if status.Code(err) == codes.PermissionDenied && lost.IsZero() {
				lost = time.Now()
			}
			mu.Unlock()
		}
	}()
	select {
	case <-answered:
	case <-time.After(clientTimeout):
		return fmt.Errorf("first SVID on the watched stream: none within %v", clientTimeout)
	}
	fmt.Println("open")
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		if in.Text() == "ask" {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			fmt.Println(once(ctx, path) == nil)
			cancel()
			continue
		}
		mu.Lock()
		if !lost.IsZero() {
			longest = max(longest, time.Since(lost))
		}
		fmt.Println(longest.Nanoseconds())
		mu.Unlock()
	}
	return nil
}
