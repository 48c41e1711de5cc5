package figures

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/server/spireapi"
)

const mb = 1e6

// BenchmarkBinary measures the size of the stripped binary.
func BenchmarkBinary(b *testing.B) {
	each(b, func(b *testing.B, k kind) {
		info, err := os.Stat(k.binary(b))
		if err != nil {
			b.Fatal(err)
		}
		figure(b, k, "stripped binary", "MB", "20", float64(info.Size())/mb)
	})
}

// BenchmarkRestart measures the time from exec to the first answer, with keys on
// disk and 100 entries. The caller retries after a millisecond.
func BenchmarkRestart(b *testing.B) {
	each(b, func(b *testing.B, k kind) {
		w := newWorld(b, entries(100, firstForThisUser))
		d := w.start(k, 1000)
		d.answers(time.Minute)
		w.waitMints(100, time.Minute)
		time.Sleep(2 * time.Second) // everything is on disk
		var took []time.Duration
		for range 9 {
			d.stop()
			begin := time.Now()
			d.run()
			took = append(took, d.answers(time.Minute).Sub(begin))
		}
		slices.Sort(took)
		figure(b, k, "restart to first SVID, median of 9", "ms", "60", float64(took[len(took)/2].Microseconds())/1000)
	})
}

// BenchmarkFirstAnswer measures how many first answers 64 clients get a second.
func BenchmarkFirstAnswer(b *testing.B) {
	for what, goal := range map[string]string{"kept": "5000", "new": "2400"} {
		b.Run(what, func(b *testing.B) {
			each(b, func(b *testing.B, k kind) {
				w := newWorld(b, entries(10, firstForThisUser))
				d := w.start(k, 1000)
				d.answers(time.Minute)
				time.Sleep(time.Second)
				c := startClient(b, os.Args[0], -1, "%s %s 5", what, d.socket)
				figure(b, k, "first answers, 64 clients, "+what+" connections", "answers/s", goal, c.hearNumber())
			})
		})
	}
}

// BenchmarkStreams measures the memory of 1,000 open streams on separate connections, and
// the time that one update takes from the first to the last of them.
func BenchmarkStreams(b *testing.B) {
	each(b, func(b *testing.B, k kind) {
		const n = 1000
		list := entries(10, firstForThisUser)
		w := newWorld(b, list)
		d := w.start(k, 1000)
		d.answers(time.Minute)
		time.Sleep(10 * time.Second)
		before := d.memory("VmRSS")
		c := startClient(b, os.Args[0], -1, "hold %s %d", d.socket, n)
		c.readWord()
		time.Sleep(15 * time.Second)
		figure(b, k, "1,000 open streams: memory of one", "KB/stream", "25", (d.memory("VmRSS")-before)/n/1000)
		c.tell("next")
		w.set(withHint(list))
		figure(b, k, "1,000 open streams: first to last push", "ms", "50", c.hearNumber()/1e6)
	})
}

// withHint changes the first entry.
func withHint(list []spireapi.Entry) []spireapi.Entry {
	list = slices.Clone(list)
	list[0].Hint = "changed"
	return list
}

// BenchmarkMemory measures the memory with SVIDs cached, 20 s after the last came.
func BenchmarkMemory(b *testing.B) {
	for _, c := range []struct {
		n    int
		goal string
	}{{1000, "26"}, {5000, "41"}} {
		b.Run(strconv.Itoa(c.n), func(b *testing.B) {
			each(b, func(b *testing.B, k kind) {
				w := newWorld(b, entries(c.n, firstForThisUser))
				d := w.start(k, c.n)
				w.waitMints(c.n, time.Minute)
				time.Sleep(20 * time.Second)
				figure(b, k, fmt.Sprintf("%d SVIDs cached: RSS", c.n), "MB", c.goal, d.memory("VmRSS")/mb)
				figure(b, k, fmt.Sprintf("%d SVIDs cached: highest RSS so far", c.n), "peak-MB", "-", d.memory("VmHWM")/mb)
			})
		})
	}
}

// BenchmarkWave measures the processor time from the taint until 1,000 SVIDs are
// replaced, with no stream and with one that holds all of them.
func BenchmarkWave(b *testing.B) {
	const n = 1000
	wave := func(b *testing.B, k kind, uid func(int) int, streams bool) (*world, time.Duration) {
		w := newWorld(b, entries(n, uid))
		d := w.start(k, n)
		w.waitMints(n, time.Minute)
		if streams {
			startClient(b, os.Args[0], -1, "hold %s 1", d.socket).readWord()
		}
		time.Sleep(10 * time.Second)
		w.resetMints(0)
		before := d.cpu()
		w.taint()
		w.waitMints(n, 3*time.Minute)
		time.Sleep(2 * time.Second) // the last push
		return w, d.cpu() - before
	}
	b.Run("idle", func(b *testing.B) {
		each(b, func(b *testing.B, k kind) {
			w, used := wave(b, k, firstForThisUser, false)
			figure(b, k, "wave of 1,000, no stream: processor time", "cpu-s", "0.4", used.Seconds())
			times := w.mints()
			figure(b, k, "wave of 1,000: most mints in a second", "mints/s", "20", float64(mostPerSecond(times)))
			figure(b, k, "wave of 1,000: first to last mint", "s", "-", times[len(times)-1].Sub(times[0]).Seconds())
		})
	})
	b.Run("stream", func(b *testing.B) {
		each(b, func(b *testing.B, k kind) {
			_, used := wave(b, k, allForThisUser, true)
			figure(b, k, "wave of 1,000, one stream holds all: processor time", "cpu-s", "0.8", used.Seconds())
		})
	})
}

// BenchmarkFrozenServer measures how long 100 workloads, each with an SVID and a stream,
// are without an SVID when the server freezes for 45 s after it has signed 40 SVIDs of a
// wave of 300.
func BenchmarkFrozenServer(b *testing.B) {
	if os.Getuid() != 0 {
		b.Skip("only root can run callers as different users")
	}
	each(b, func(b *testing.B, k kind) {
		const n, callers, base = 300, 100, 1_000_000
		w := newWorld(b, entries(n, func(i int) int { return base + i }))
		d := w.start(k, 1000)
		w.waitMints(n, time.Minute)
		self := w.copySelf()
		clients := make([]*client, callers)
		for i := range clients {
			clients[i] = startClient(b, self, base+i, "watch %s 0", d.socket)
			clients[i].readWord()
		}
		time.Sleep(10 * time.Second)
		w.resetMints(40)
		w.taint()
		w.waitMints(40, time.Minute)
		time.Sleep(30 * time.Second)
		served := 0
		for _, c := range clients {
			c.tell("ask")
		}
		for _, c := range clients {
			if c.readWord() == "true" {
				served++
			}
		}
		time.Sleep(10 * time.Second)
		w.resetMints(0)
		w.frozen.thaw()
		time.Sleep(30 * time.Second)
		lost, longest := 0, 0.0
		for _, c := range clients {
			c.tell("end")
			if gap := c.hearNumber(); gap > 0 {
				lost++
				longest = max(longest, gap)
			}
		}
		for _, c := range clients {
			c.end()
		}
		figure(b, k, "server frozen 45 s, 100 streams: lost their SVID", "streams", "0", float64(lost))
		figure(b, k, "server frozen 45 s, 100 streams: longest gap", "gap-s", "0", longest/1e9)
		figure(b, k, "server frozen 45 s: new callers served of 100", "callers", "100", float64(served))
	})
}

// BenchmarkServerBack measures how long the renewal of 151 SVIDs of a tainted authority
// takes after the server was down for a minute.
func BenchmarkServerBack(b *testing.B) {
	each(b, func(b *testing.B, k kind) {
		const n = 151
		w := newWorld(b, entries(n, firstForThisUser))
		d := w.start(k, 1000)
		d.answers(time.Minute)
		w.waitMints(n, time.Minute)
		time.Sleep(2 * time.Second)
		w.refuse.Store(true)
		w.taint()
		for range 2 { // the first may have been fetched before the taint
			select {
			case <-w.bundles:
			case <-time.After(30 * time.Second):
				b.Fatal("no bundle fetch")
			}
		}
		w.stop()
		w.refuse.Store(false)
		w.resetMints(0)
		time.Sleep(time.Minute)
		begin := time.Now()
		w.serve()
		w.waitMints(n, 3*time.Minute)
		figure(b, k, "server back after a minute: 151 waiting SVIDs done", "s", "12", time.Since(begin).Seconds())
	})
}
