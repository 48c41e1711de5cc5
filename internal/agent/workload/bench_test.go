package workload

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
)

// The clients of these benchmarks run in another process, so that only the server's
// memory and CPU time are measured.
const clientEnv = "RENEWD_BENCH_CLIENT"

func TestMain(m *testing.M) {
	if spec := os.Getenv(clientEnv); spec != "" {
		if err := benchClient(spec); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func dialSocket(path string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
}

// benchClient runs "what socket count": first answers over kept or new
// connections, open streams that report when each answer arrived, or go-spiffe's
// source.
func benchClient(spec string) error {
	f := strings.Fields(spec)
	what, path := f[0], f[1]
	n, err := strconv.Atoi(f[2])
	if err != nil {
		return err
	}
	switch what {
	case "hold":
		return holdStreams(path, n)
	case "watch":
		return watchSource(path)
	}
	return firstAnswers(path, n, what == "kept")
}

// firstAnswers makes n calls in all with 64 clients.
func firstAnswers(path string, n int, kept bool) error {
	const clients = 64
	var remaining atomic.Int64
	remaining.Store(int64(n))
	errs := make([]error, clients)
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() {
			var cc *grpc.ClientConn
			for remaining.Add(-1) >= 0 && errs[i] == nil {
				if cc == nil {
					if cc, errs[i] = dialSocket(path); errs[i] != nil {
						return
					}
				}
				ctx, cancel := context.WithCancel(withHeader(context.Background()))
				stream, err := workloadpb.NewSpiffeWorkloadAPIClient(cc).FetchX509SVID(ctx, &workloadpb.X509SVIDRequest{})
				if err == nil {
					_, err = stream.Recv()
				}
				cancel()
				errs[i] = err
				if !kept {
					cc.Close()
					cc = nil
				}
			}
			if cc != nil {
				cc.Close()
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// holdStreams opens n streams on a connection each and prints a line for each
// round in which every stream got an answer: the spread in nanoseconds and the
// time of the last in Unix nanoseconds.
func holdStreams(path string, n int) error {
	answers := make(chan error, n)
	for range n {
		cc, err := dialSocket(path)
		if err != nil {
			return err
		}
		go func() {
			stream, err := workloadpb.NewSpiffeWorkloadAPIClient(cc).FetchX509SVID(withHeader(context.Background()), &workloadpb.X509SVIDRequest{})
			for err == nil {
				_, err = stream.Recv()
				answers <- err
			}
			answers <- err
		}()
	}
	go func() { // ends with its parent
		os.Stdin.Read(make([]byte, 1))
		os.Exit(0)
	}()
	for {
		var first time.Time
		for i := range n {
			if err := <-answers; err != nil {
				return err
			}
			if i == 0 {
				first = time.Now()
			}
		}
		last := time.Now()
		fmt.Println(last.Sub(first).Nanoseconds(), last.UnixNano())
	}
}

func startClient(b *testing.B, spec string) (cmd *exec.Cmd, lines func() (spread time.Duration, last time.Time)) {
	b.Helper()
	cmd = exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), clientEnv+"="+spec)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { in.Close(); cmd.Wait() })
	return cmd, func() (time.Duration, time.Time) {
		var spread, at int64
		if _, err := fmt.Fscan(out, &spread, &at); err != nil {
			b.Fatal(err)
		}
		return time.Duration(spread), time.Unix(0, at)
	}
}

func cpu() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func rss(b *testing.B) int {
	b.Helper()
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.Atoi(strings.Fields(v)[0])
			if err != nil {
				b.Fatal(err)
			}
			return kb << 10
		}
	}
	b.Fatal("no VmRSS")
	return 0
}

// BenchmarkFirstAnswer is how fast callers get their first answer, with the
// real attestor: 64 clients that keep their connection or make one each time.
func BenchmarkFirstAnswer(b *testing.B) {
	for _, what := range []string{"kept", "new"} {
		b.Run(what, func(b *testing.B) {
			_, path, _ := serveSocket(b, nil)
			before := cpu()
			b.ResetTimer()
			cmd, _ := startClient(b, fmt.Sprint(what, " ", path, " ", b.N))
			if err := cmd.Wait(); err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "answers/s")
			b.ReportMetric(float64((cpu()-before).Microseconds())/float64(b.N), "server-cpu-us/op")
		})
	}
}

// BenchmarkPush1000Streams is how long one update takes to reach 1,000 streams
// with a connection each: from the first push to the last and from the update
// to the last, and the memory of an idle stream.
func BenchmarkPush1000Streams(b *testing.B) {
	const n = 1000
	s, path, e := serveSocket(b, nil)
	freeMemory()
	before := rss(b)
	_, line := startClient(b, fmt.Sprint("hold ", path, " ", n))
	line()
	freeMemory()
	perStream := float64(rss(b)-before) / n
	var spread, reach, busy time.Duration
	for b.Loop() {
		time.Sleep(PushSpacing)
		svid := s.ca.svid(b, e, time.Hour)
		used := cpu()
		start := time.Now()
		if err := s.cache.Put(svid); err != nil {
			b.Fatal(err)
		}
		d, at := line()
		spread, reach, busy = spread+d, reach+at.Sub(start), busy+cpu()-used
	}
	b.ReportMetric(perStream, "rss-B/stream")
	b.ReportMetric(float64(spread.Microseconds())/float64(b.N)/1000, "first-to-last-ms")
	b.ReportMetric(float64(reach.Nanoseconds())/float64(b.N), "ns/op") // without the wait between pushes
	b.ReportMetric(float64(busy.Microseconds())/float64(b.N)/n, "server-cpu-us/push")
}

// BenchmarkPush1000Identities is one push to one stream that holds 1,000
// identities.
func BenchmarkPush1000Identities(b *testing.B) {
	s, path, e := serveSocket(b, nil)
	entries := make([]*cache.Entry, 999)
	for i := range entries {
		entries[i] = entry(fmt.Sprintf("x%03d", i), fmt.Sprintf("/load/%d", i), uint32(os.Geteuid()))
	}
	s.add(entries...)
	_, line := startClient(b, fmt.Sprint("hold ", path, " 1"))
	line()
	var reach, busy time.Duration
	for b.Loop() {
		time.Sleep(PushSpacing)
		svid := s.ca.svid(b, e, time.Hour)
		used, start := cpu(), time.Now()
		if err := s.cache.Put(svid); err != nil {
			b.Fatal(err)
		}
		_, at := line()
		reach, busy = reach+at.Sub(start), busy+cpu()-used
	}
	b.ReportMetric(float64(reach.Nanoseconds())/float64(b.N), "ns/op") // without the wait between pushes
	b.ReportMetric(float64(busy.Microseconds())/float64(b.N), "server-cpu-us/push")
}

func BenchmarkEncode(b *testing.B) {
	ca := newAuthority(b, td, "a")
	snapshot := &bundle.Snapshot{Own: bundleOf(b, td, 1, ca)}
	for _, n := range []int{1, 1000} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			v := cache.View{Bundle: snapshot}
			svid := ca.svid(b, entry("e", "/workload", 1), time.Hour)
			for range n {
				v.Identities = append(v.Identities, cache.Identity{SVID: svid})
			}
			b.ReportAllocs()
			for b.Loop() {
				a := newX509Answer(&v)
				a.encode(a.size()).Free()
			}
		})
	}
}

// freeMemory returns unused memory to the operating system.
func freeMemory() {
	debug.FreeOSMemory()
	time.Sleep(50 * time.Millisecond)
	debug.FreeOSMemory()
}
