package lvm

import (
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/enginetest"
	"github.com/quarry-csi/quarry/test/lab"
)

func TestConformanceThick(t *testing.T) {
	lab.Need(t)
	enginetest.Run(t, enginetest.Harness{Slow: true, Expect: []engine.Capability{engine.CapMeter}, Domain: func(t testing.TB) func(t testing.TB) engine.Engine {
		return newGroup(t, 600).opener()
	}})
}

func TestConformanceThin(t *testing.T) {
	lab.Need(t)
	expect := []engine.Capability{engine.CapSnapshot, engine.CapClone, engine.CapMeter}
	enginetest.Run(t, enginetest.Harness{Slow: true, Expect: expect, Domain: func(t testing.TB) func(t testing.TB) engine.Engine {
		return newGroup(t, 600).withPool(t, "300m", "4m").opener()
	}})
}
