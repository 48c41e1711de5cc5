package wave_test

import (
	"encoding/binary"
	"math"
	"testing"
	"time"

	"github.com/renewd/renewd/renew/wave"
)

// The delays of many nodes are uniform on [0, 60 s): the Kolmogorov-Smirnov
// statistic of 1,000 of them stays below its value for p = 0.0001.
func TestTaintDelayIsUniform(t *testing.T) {
	const nodes, limit = 1000, time.Minute
	var counts [nodes]int
	for n := range nodes {
		var seed [32]byte
		binary.BigEndian.PutUint32(seed[:], uint32(n))
		d := wave.Delay(seed, "authority", limit)
		if d < 0 || d >= limit {
			t.Fatalf("delay %v is outside [0, %v)", d, limit)
		}
		if again := wave.Delay(seed, "authority", limit); again != d {
			t.Fatalf("delay of the same node and taint was %v and then %v", d, again)
		}
		if other := wave.Delay(seed, "other", limit); other == d {
			t.Fatalf("two taints have the same delay %v", d)
		}
		counts[int(float64(d)/float64(limit)*nodes)]++
	}
	worst, below := 0.0, 0
	for i, c := range counts {
		below += c
		worst = max(worst, math.Abs(float64(below)/nodes-float64(i+1)/nodes))
	}
	if limit := 2.23 / math.Sqrt(nodes); worst > limit {
		t.Errorf("KS statistic %.4f is above %.4f: delays are not uniform", worst, limit)
	}
	if wave.Delay([32]byte{1}, "a", 0) != 0 {
		t.Error("a limit of zero must mean no delay")
	}
}
